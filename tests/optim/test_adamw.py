import copy

import pytest
import torch

from lisatune import AdamW
from lisatune.optim.adamw import round_stochastically


def test_equals_torch_in_float32():
    """To rounding: torch orders the same operations otherwise; 1e-6 of weights near 1."""
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    a, b = AdamW([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for step in range(20):
        ours.grad = theirs.grad = torch.sin(torch.arange(50.0) * step)
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("optimizer", "arrives"), [(AdamW, True), (torch.optim.AdamW, False)])
def test_small_updates_arrive_in_bfloat16(optimizer, arrives):
    """100 steps of 1e-4 on a weight of 1 make 0.99 in float32; rounding to nearest leaves 1."""
    weight = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    opt = optimizer([weight], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        opt.step()
    mean = weight.float().mean().item()
    # one weight's last step is at most 2**-8, spread over 4,096 weights and 100 steps: 6e-4 is 10 sigma
    assert (abs(mean - 0.99) < 6e-4) if arrives else mean == 1


def test_rounding_is_unbiased_and_exact_where_it_can_be():
    x = torch.tensor([1.0, -2.5, 0.0, float("inf"), float("-inf"), 1e-3, 3.14159])
    exact = x.bfloat16().float() == x
    many = torch.stack([round_stochastically(x) for _ in range(20_000)]).float()
    assert (many[:, exact] == x[exact]).all()
    finite = x.isfinite()
    spacing = x[finite].abs() / 128
    # the mean of 20,000 draws lies within 5 sigma = 5 * spacing / 2 / sqrt(20,000) of the value
    assert ((many[:, finite].mean(0) - x[finite]).abs() <= 5 * spacing / 2 / 20_000**0.5 + 1e-9).all()
    assert round_stochastically(torch.tensor([float("nan")])).isnan().all()


def test_noise_depends_on_seed_and_step_alone():
    def run(stop_at=None):
        weight = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        optimizer = AdamW([weight], lr=1e-3, seed=5)
        for step in range(8):
            if step == stop_at:
                saved = copy.deepcopy(optimizer.state_dict())
                weight = torch.nn.Parameter(weight.detach().clone())
                optimizer = AdamW([weight], lr=1e-3, seed=99)
                optimizer.seed = 5
                optimizer.load_state_dict(saved)
                assert {v.dtype for s in optimizer.state.values() for v in s.values()} == {torch.float32}
            weight.grad = torch.full_like(weight, step + 1)
            optimizer.step()
        return weight

    assert torch.equal(run(), run())
    assert torch.equal(run(), run(stop_at=4))


def test_frozen_parameters_get_no_state():
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([a, b], weight_decay=0.5)
    a.grad = torch.ones(2)
    optimizer.step()
    assert a in optimizer.state
    assert b not in optimizer.state
    assert torch.equal(b, torch.ones(2))
