"""Slices in ``lisatune train``: what a step makes, and levers that may change no bit of it."""

import pytest
import torch

from lisatune.assemble import make_learner
from lisatune.data.loader import Batch
from lisatune.settings import build_config
from tiny import VOCABULARY, make_llama

NEEDED = {"model": "m", "data": "d", "output": "o", "device": "cpu", "learning_rate": 1e-2, "weight_decay": 0.1}
SLICES = NEEDED | {"sampled_unit": "slices", "num_slices": 5, "max_grad_norm": 0}


def batch(step, rows=4, tokens=16):
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(step))
    return Batch(ids, ids.roll(-1, 1), torch.arange(tokens).repeat(rows, 1), torch.ones_like(ids, dtype=torch.bool))


def learner_of(model=None, **settings):
    config = build_config(SLICES | settings)
    model = (make_llama(tied=True) if model is None else model).to(
        getattr(torch, config.dtype.replace("auto", "float32"))
    )
    return make_learner(config, model, torch.device("cpu"))


def trained(learner, steps=6):
    learner.model.train()
    for step in range(steps):
        learner.step(step, [batch(step)], batch(step).num_labelled)
    return {name: p.detach().clone() for name, p in learner.model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("slices_of", ["rows", "columns"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "lever", [{"gradient_checkpointing": True}, {"optimizer_in_backward": True}, {"gradient_checkpointing": 2, "optimizer_in_backward": True}]
)  # fmt: skip
def test_levers_change_no_bit(dtype, lever, slices_of):
    plain = {"dtype": dtype, "slices_of": slices_of}
    assert same(trained(learner_of(**plain)), trained(learner_of(**plain, **lever)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_state_each_step_is_the_first_of_adam(dtype):
    """Its slow equal makes moments and drops them; to rounding, which in bfloat16 decides a few roundings at random."""
    fast, slow = learner_of(dtype=dtype), learner_of(dtype=dtype)
    for group in slow.optimizer.param_groups:
        group["stateless"] = False
    one, other = trained(fast, steps=1), trained(slow, steps=1)  # later gradients near 0 may differ in their sign
    assert not fast.optimizer.state
    assert slow.optimizer.state
    for name, weight in one.items():
        if dtype == "float32":
            torch.testing.assert_close(weight, other[name], rtol=3 * 2**-23, atol=1e-8)
        else:
            assert (weight != other[name]).float().mean() < 0.01, name


@pytest.mark.parametrize(
    ("slices_of", "more"), [("rows", {}), ("columns", {"optimizer_in_backward": True})], ids=["rows", "columns"]
)
def test_one_slice_is_full_to_the_bit(slices_of, more):
    """Columns take lisatune.AdamW, and so does full with its step in the backward pass."""
    whole = learner_of(method="full", sampled_unit=None, num_slices=None, **more)
    sliced = learner_of(num_slices=1, train_norms=True, slices_of=slices_of, **more)
    assert same(trained(whole), trained(sliced))


def test_no_gradient_of_other_rows_is_made_and_none_outlives_its_update():
    learner = learner_of(optimizer_in_backward=True, num_slices=8)
    learner.model.train()
    sizes = []
    for p in learner.model.parameters():
        p.requires_grad_(True)
        p.register_post_accumulate_grad_hook(lambda p: sizes.append(0 if p.grad is None else p.grad.numel()))
    learner.step(0, [batch(0)], batch(0).num_labelled)
    cuts = learner.engine.cuts.values()
    assert sizes == [0] * len(cuts)  # the update in the hook before has dropped it
    assert all(p.grad is None for p in learner.model.parameters())
    assert sum(slot.numel() for cut in cuts for slot in cut.slots) == learner.engine.num_trainable()
    assert not learner.optimizer.state


def test_rates_of_parts_and_what_a_step_moves():
    learner = learner_of(embedding_lr_ratio=0.25, num_slices=2, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in learner.model.state_dict().items()}
    for group in learner.optimizer.param_groups:
        group["lr"] = 1e-2 * group["lr_ratio"]
    after = trained(learner, steps=1)
    steps = {name: (after[name] - before[name]).abs().max().item() for name in before}
    assert steps["model.embed_tokens.weight"] == pytest.approx(2.5e-3, rel=1e-3)
    assert steps["model.layers.1.mlp.up_proj.weight"] == pytest.approx(1e-2, rel=1e-3)
    assert steps["model.norm.weight"] == 0


def test_a_forecast_draws_as_many_slices_as_are_ever_drawn():
    """A sweep of 5 slices, 2 at a time, begins with one."""
    learner = learner_of(num_slices=5, num_active=2, interval_steps=4)
    rows = []
    for more in (False, True):
        if more:
            learner.method.draw_always(())
            learner.engine._interval = None
        learner.step(0, [batch(0)], batch(0).num_labelled)
        rows.append([sum(stop - start for start, stop in cut.ranges) for cut in learner.engine.cuts.values()])
    assert all(one < two for one, two in zip(*rows, strict=True))


@pytest.mark.parametrize("slices_of", ["rows", "columns"])
def test_a_factored_moment_is_of_all_slices_from_the_first_step_on(slices_of):
    learner = learner_of(optim="factored", num_slices=8, slices_of=slices_of)
    for step in range(3):
        learner.step(step, [batch(step)], batch(step).num_labelled)
        state = sum(value.numel() for of in learner.optimizer.state.values() for value in of.values())
        assert state == sum(8 + sum(cut.weight.shape) for cut in learner.engine.cuts.values())
        assert all(of["turns"].sum() == step + 1 for of in learner.optimizer.state.values())
    parameters = {name: cut.weight for name, cut in learner.engine.cuts.items()}
    saved = learner.method.states(parameters, learner.optimizer)
    assert saved.keys() == parameters.keys()  # not that of the slice which trains now
