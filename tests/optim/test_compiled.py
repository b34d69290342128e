"""The compiled arithmetic of AdamW against the plain one."""

import pytest
import torch
import torch._inductor.config
from torch._dynamo.utils import counters

from lisatune import AdamW, UserError
from lisatune.memory.ledger import Ledger
from lisatune.optim import compiled, make_optimizer

SHAPES = [(70, 256), (3, 20, 64), (1024,), (300,), (33, 7), ()]  # the last three are no whole groups


def trained(bits, dtype=torch.bfloat16, *, counted=False, steps=4, **options):
    generator = torch.Generator().manual_seed(3)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    optimizer = AdamW(parameters, weight_decay=0.1, state_bits=bits, **options)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 / (1 + step)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        if counted:
            with Ledger(granularity=1, device_type="cpu"):
                optimizer.step()
        else:
            optimizer.step()
    return parameters, optimizer


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a[0], b[0], strict=True)) and all(
        torch.equal(a[1].state[p][name], b[1].state[q][name])
        for p, q in zip(a[0], b[0], strict=True)
        for name in a[1].state[p]
    )


@pytest.mark.parametrize(
    "bits", [32, pytest.param(16, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_it_is_the_plain_one_to_rounding_and_is_compiled_once(bits):
    """One kernel for all lengths, steps, rates and seeds; it gives the same bits in any blocks, and while tensors are counted.

    A moment is rounded apart by one part in 2**23 a step. That carries a bfloat16 weight, or a code, over to its neighbour
    as often as the noise comes so near to its edge: one in 10**5 at most, where one in 10**6 was seen.
    """
    before = counters["stats"]["unique_graphs"]
    whole = trained(bits, compiled=True)
    made = counters["stats"]["unique_graphs"] - before
    assert made <= 1  # none if another test has made it
    assert same(whole, trained(bits, compiled=True, block_elements=1024))
    assert same(whole, trained(bits, compiled=True, counted=True))
    assert not same(whole, trained(bits, compiled=True, seed=1))
    assert counters["stats"]["unique_graphs"] - before == made
    plain = trained(bits)
    for p, q in zip(plain[0], whole[0], strict=True):
        assert (p != q).float().mean() <= 1e-5
    for p, q in zip(plain[0], whole[0], strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            one, other = plain[1].state[p][name].float(), whole[1].state[q][name].float()
            if bits == 32:
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)  # 4 steps, moments below 0.5
            else:
                assert (one != other).float().mean() <= 1e-3


def test_without_moments_it_is_the_plain_one_to_the_bit():
    """Together, and one parameter at a time as in the backward pass."""
    before = counters["stats"]["unique_graphs"]
    fast = trained(32, stateless=True, compiled=True)
    assert same(trained(32, stateless=True), fast)
    alone, optimizer = trained(32, stateless=True, compiled=True, steps=0)
    generator = torch.Generator().manual_seed(3)
    for shape in SHAPES:
        torch.randn(shape, generator=generator)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 1e-3 / (1 + step)
        for p in alone:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            optimizer.update(p)
        optimizer.param_groups[0]["num_steps"] += 1
    assert all(torch.equal(p, q) for p, q in zip(alone, fast[0], strict=True))
    assert counters["stats"]["unique_graphs"] - before <= 3  # gradients of two types, and one element by itself


def test_kernels_make_no_tensor_of_the_block_but_for_8_bits():
    """So the forecast of 16 and 32 bits has none; only what PyTorch made before, the gradient in float32."""
    assert [compiled.no_more_than(bits) for bits in (32, 16, 8)] == [0, 0, 13]


def test_without_a_compiler_it_says_what_to_install():
    torch._dynamo.reset()
    try:
        with (
            torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")}),
            pytest.raises(UserError, match=r"optim_compile=true: a C\+\+ compiler \(g\+\+\) is missing"),
        ):
            trained(32, compiled=True)
    finally:
        torch._dynamo.reset()


def test_where_torch_has_one_kernel_already_it_is_refused():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(4, 256))], "stateless": False}]
    given = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "optim_compile": True}
    with pytest.raises(UserError, match="no effect with float32 weights"):
        make_optimizer("adamw", groups, **given)
    assert make_optimizer("adamw_8bit", groups, **given).compiled
