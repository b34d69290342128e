"""A second moment in factors: the plain rule in double precision, slices, and what is kept."""

import pytest
import torch
from torch import nn

from lisatune import UserError
from lisatune.memory.blocks import Cut, block_range
from lisatune.optim.adamw import AdamW
from lisatune.optim.factored import factored_state, stacks
from lisatune.optim.spectral import spectral_step

LR, DECAY, BETA, EPS = 1e-2, 0.1, 0.9, 1e-8
SETTINGS = {"lr": LR, "weight_decay": DECAY, "betas": (0.0, BETA), "factored": True}


def gradients(shape, steps=5):
    made = torch.randn(steps, *shape, generator=torch.Generator().manual_seed(0))
    return made * torch.linspace(0.1, 3, shape[-1])  # columns of different size


def plain_rule(weight, steps, num_slices=1, dim=0, order=None, spectral=False):
    """The slow equal, in double precision: of slices, numbers of their own along ``dim``, and common ones across."""
    weight = weight.double().clone()
    along, across = torch.zeros(weight.shape[dim]).double(), torch.zeros(weight.shape[1 - dim]).double()
    turns, beta = [0] * num_slices, BETA**num_slices
    for step, gradient in enumerate(steps):
        block = order[step] if order else 0
        own = slice(*block_range(weight.shape[dim], num_slices, block))
        part = (own, slice(None)) if dim == 0 else (slice(None), own)
        g = gradient.double()[part]
        turns[block] += 1
        along[own] = beta * along[own] + (1 - beta) * g.square().mean(1 - dim)
        across = BETA * across + (1 - BETA) * g.square().mean(dim)
        size, shape = along[own] / (1 - beta ** turns[block]), across / across.mean()
        moment = torch.outer(size, shape) if dim == 0 else torch.outer(shape, size)
        taken = g / (moment.sqrt() + EPS)
        taken = spectral_step(taken) * taken.square().mean().sqrt() if spectral else taken.clamp(-1, 1)
        weight[part] = weight[part] * (1 - LR * DECAY) - LR * taken
    return weight


@pytest.mark.parametrize("spectral", [False, True])
@pytest.mark.parametrize("block_elements", [2**22, 256])
def test_weights_are_those_of_the_plain_rule_in_any_blocks(block_elements, spectral):
    start = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    weight = nn.Parameter(start.clone())
    optimizer = AdamW([weight], **SETTINGS, spectral=spectral, block_elements=block_elements)
    for gradient in gradients((24, 64)):
        weight.grad = gradient
        optimizer.step()
    expected = plain_rule(start, gradients((24, 64)), spectral=spectral)
    torch.testing.assert_close(
        weight.detach().double(), expected, rtol=0.0, atol=1e-4 * LR if not spectral else 1e-2 * LR
    )


@pytest.mark.parametrize("of", ["rows", "columns"])
@pytest.mark.parametrize("spectral", [False, True])
def test_slices_keep_their_moment_between_turns_and_share_one_across(of, spectral):
    start = torch.randn(9, 12, generator=torch.Generator().manual_seed(1))
    weight, order = nn.Parameter(start.clone()), [2, 0, 1, 1, 0]
    cut = Cut("weight", weight, num_slices=3, num_active=1, of=of)
    optimizer = AdamW([weight], **SETTINGS, spectral=spectral)
    optimizer.param_groups[0]["params"][:] = cut.slots
    for block, gradient in zip(order, gradients((9, 12)), strict=True):
        cut.place([block])
        cut.slots[0].grad = cut.part(gradient, cut.ranges[0]).clone()
        optimizer.step()
    expected = plain_rule(start, gradients((9, 12)), 3, cut.dim, order, spectral)
    torch.testing.assert_close(
        weight.detach().double(), expected, rtol=0.0, atol=1e-4 * LR if not spectral else 1e-2 * LR
    )
    (state,) = optimizer.state.values()
    assert {name: len(value) for name, value in state.items()} == {
        "turns": 3, "along_sq": 9 if of == "rows" else 12, "across_sq": 12 if of == "rows" else 9,
    }  # fmt: skip
    assert state["turns"].tolist() == [2, 2, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spectral", [False, True])
@pytest.mark.parametrize("of", ["rows", "columns"])
def test_matrices_that_are_alike_are_updated_together_as_each_by_itself(of, spectral, dtype):
    """Slots of one matrix share their moment, so they are never alike."""
    given = [gradients((9, 12), steps=4).to(dtype) * factor for factor in (1, 3, 0.1)]
    weights = []
    for together in (True, False):
        noise = torch.Generator().manual_seed(1)
        wholes = [nn.Parameter(torch.randn(9, 12, generator=noise).to(dtype)) for _ in given]
        cuts = [Cut("weight", weight, num_slices=3, num_active=2, of=of) for weight in wholes]
        optimizer = AdamW(wholes, **SETTINGS, spectral=spectral)
        optimizer.param_groups[0]["params"][:] = slots = [slot for cut in cuts for slot in cut.slots]
        for step, blocks in enumerate(([0, 1], [2, 0], [1, 2], [0, 2])):
            for cut, gradient in zip(cuts, given, strict=True):
                cut.place(blocks)
                for slot, of_slot in zip(cut.slots, cut.ranges, strict=True):
                    slot.grad = cut.part(gradient[step], of_slot).clone()
            for slot in [] if together else slots:
                optimizer.update(slot)
                slot.grad = None
            sizes = [len(stack) for stack in stacks(slots, 36 * 3)]
            assert sizes == [3, 3]
            optimizer.step()
        weights.append([weight.detach() for weight in wholes] + [s["across_sq"] for s in optimizer.state.values()])
    for ours, alone in zip(*weights, strict=True):
        if ours.dtype == torch.float32:
            torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-4 * LR)
        else:  # the last bit of a product decides a few roundings at random
            assert (ours != alone).float().mean() < 0.1


def test_a_vector_has_adams_second_moment():
    start = torch.ones(7)
    ours, adam = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = AdamW([ours], **SETTINGS), torch.optim.AdamW([adam], lr=LR, weight_decay=DECAY, betas=(0.0, BETA))
    for gradient in gradients((7,)).abs().sort(0, descending=True).values:  # no element is larger than its mean before
        ours.grad, adam.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, adam, rtol=1e-5, atol=1e-7)


def test_rows_and_columns_without_gradient_stay_and_infinite_numbers_are_never_made():
    weight = nn.Parameter(torch.ones(4, 6))
    optimizer = AdamW([weight], **SETTINGS | {"weight_decay": 0.0})
    weight.grad = torch.zeros(4, 6)
    optimizer.step()
    weight.grad[1, 2:] = 1e-12
    optimizer.step()
    assert torch.isfinite(weight).all()
    assert (weight[[0, 2, 3]] == 1).all()
    assert (weight[:, :2] == 1).all()


def test_bfloat16_weights_are_rounded_at_random_and_gradients_may_be_bfloat16():
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = AdamW([weight], **SETTINGS | {"lr": 1e-4, "weight_decay": 0.0})
    for _ in range(10):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.float().mean().item() == pytest.approx(1 - 1e-3, abs=2e-4)  # round to nearest would leave it at 1


def test_saved_state_comes_back_to_the_bit_and_that_of_another_shape_is_refused():
    def make():
        weight = nn.Parameter(torch.ones(4, 6))
        return weight, AdamW([weight], **SETTINGS)

    def train(weight, optimizer, steps):
        for gradient in steps:
            weight.grad = gradient.clone()
            optimizer.step()

    steps = gradients((4, 6))
    straight, optimizer = make()
    train(straight, optimizer, steps[:3])
    resumed, other = make()
    with torch.no_grad():
        resumed.copy_(straight)
    other.load_state_dict(optimizer.state_dict())
    train(straight, optimizer, steps[3:])
    train(resumed, other, steps[3:])
    assert torch.equal(straight, resumed)
    saved = factored_state(torch.zeros(4, 7))
    with pytest.raises(UserError, match=r"the saved across_sq has the shape \(7,\) instead of \(6,\)"):
        other.place_state(resumed, saved)
