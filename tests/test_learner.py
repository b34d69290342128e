"""One step, with every lever: the same weights as without it, or a reason why not."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lever_steps import CPU, batch, config, run
from lisatune import UserError
from lisatune.assemble import make_learner
from lisatune.learner import on_host
from lisatune.optim.saved_state import place_state
from rounding import apart_tiny_llama
from tiny import make_llama
from ways import WAYS, named


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("way", "method"),
    [(way, method) for way in WAYS if way.bit_equal_to is not None for method in (None, *way.also_with)],
    ids=str,
)
def test_a_way_has_the_weights_of_its_plain_equal(way, method):
    """To the bit, with one optimizer on both sides; it is ours, since some levers need it."""
    way.skip_if_missing()
    both = {"optim": "adamw_16bit"} | ({"method": method} if method else {})
    expected, told = run(**both | way.bit_equal_to)
    got, said = run(**both | way.settings)
    assert equal(expected, got)
    assert [loss for loss, _ in told] == [loss for loss, _ in said]
    # the squares are summed in another order; float32
    assert [norm for _, norm in said] == pytest.approx([norm for _, norm in told], rel=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("micro_rows", [4, 1])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_vocabulary_in_blocks_is_the_same_step(tied, micro_rows, max_grad_norm):
    """With clipping and accumulation, to rounding: each step from equal weights, since steps differ more and more otherwise.

    With an epsilon of 1 a weight moves nearly in proportion to its gradient. With 1e-8 a gradient that is but rounding
    moves its weight by a whole step, in one direction or the other, and nothing could be said of the weights.
    """
    settings = {"num_active": 1, "interval_steps": 2, "adam_epsilon": 1.0, "max_grad_norm": max_grad_norm}
    plain, blocks = (
        make_learner(config(vocabulary_blocks=in_blocks, **settings), make_llama(tied=tied), CPU)
        for in_blocks in (False, True)
    )
    tolerance = apart_tiny_llama()
    for step in range(6):
        before = {name: p.detach().clone() for name, p in plain.model.named_parameters()}
        blocks.model.load_state_dict(plain.model.state_dict())
        whole, outcomes = batch(step), []
        for learner in (plain, blocks):
            learner.model.train()
            outcomes.append(learner.step(step, whole.split(micro_rows), whole.num_labelled))
        assert outcomes[1].loss.item() == pytest.approx(outcomes[0].loss.item(), rel=tolerance)
        assert outcomes[1].grad_norm.item() == pytest.approx(outcomes[0].grad_norm.item(), rel=tolerance)
        moved = {name: p.detach() - before[name] for name, p in plain.model.named_parameters()}
        moved_too = {name: p.detach() - before[name] for name, p in blocks.model.named_parameters()}
        assert size_of(moved) > 0
        for part in ("embed_tokens", "lm_head", ""):
            some, other = ({n: m for n, m in all_of.items() if part in n} for all_of in (moved, moved_too))
            assert size_of({n: some[n] - other[n] for n in some}) <= tolerance * size_of(some), (step, part)


def size_of(tensors):
    """The norm of all of them together."""
    return sum(t.double().square().sum() for t in tensors.values()) ** 0.5


def test_in_blocks_no_gradient_of_embedding_or_head_exists():
    learner = make_learner(config(vocabulary_blocks=True, num_active=1), make_llama(), CPU)
    learner.model.train()
    seen = []
    for name in ("embedding", "head"):
        weight = getattr(learner.layers, name).weight
        weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    before = learner.layers.embedding.weight.detach().clone()
    whole = batch(0)
    learner.step(0, [whole], whole.num_labelled)
    assert not any(grad is not None for grad in seen)
    assert not torch.equal(before, learner.layers.embedding.weight)


@pytest.mark.parametrize("bits", [16, 8])
def test_short_moments_learn_nearly_as_fast(bits):
    """30 steps on one batch: within 3% of the loss that 32 bits reach; 0.3% and 0.7% were seen."""

    def last_loss(optim):
        torch.manual_seed(0)
        learner = make_learner(config(method="full", optim=optim, learning_rate=3e-3), make_llama(), CPU)
        whole = batch(0)
        for step in range(30):
            loss, _, _ = learner.step(step, [whole], whole.num_labelled)
        return loss.item()

    assert last_loss(f"adamw_{bits}bit") == pytest.approx(last_loss("adamw"), rel=0.03)


def test_embedding_and_head_can_be_drawn_like_layers():
    learner = make_learner(
        config(num_active=2, interval_steps=1, train_embedding="sampled", train_head="sampled"), make_llama(), CPU
    )
    engine = learner.engine
    assert engine.pool == ("layers.0", "layers.1", "layers.2", "layers.3", "embedding", "head")
    learner.model.train()
    drawn = set()
    for step in range(40):
        before = {n: p.detach().clone() for n, p in learner.model.named_parameters()}
        whole = batch(step)
        learner.step(step, [whole], whole.num_labelled)
        parts = {engine.pool[i] for i in engine.drawn}
        drawn |= parts
        assert len(parts) == 2
        for part, own in learner.layers.parts().items():
            changed = any(not torch.equal(before[n], p) for n, p in own.items())
            assert changed == (bool(own) and (part in parts or part == "norm")), (step, part)
            assert all((p in learner.optimizer.state) == changed for p in own.values())
    assert drawn == set(engine.pool)


def test_a_tied_pair_is_drawn_as_one():
    learner = make_learner(config(train_embedding="sampled", train_head="sampled"), make_llama(tied=True), CPU)
    assert learner.engine.pool[4:] == ("embedding",)
    with pytest.raises(UserError, match="embedding and head are one tensor"):
        make_learner(config(train_embedding="sampled"), make_llama(tied=True), CPU)


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_loss_that_is_not_finite_is_a_bad_step(in_backward):
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    levers = {"optimizer_in_backward": True, "max_grad_norm": 0} if in_backward else {}
    learner = make_learner(config(**levers), model, CPU)
    whole = batch(0)
    before = [p.detach().clone() for p in model.parameters()]
    assert learner.step(0, [whole], whole.num_labelled).bad
    if not in_backward:
        assert all(
            torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, model.parameters(), strict=True)
        )
        assert not learner.optimizer.state


def test_adapter_on_the_head_takes_part_in_the_loss():
    pytest.importorskip("peft", reason="the extra 'lora' is not installed")
    learner = make_learner(config(method="lora", lora_target_modules=["lm_head"]), make_llama(), CPU)
    assert not learner.linear_head
    before = [p.detach().clone() for p in learner.model.parameters() if p.requires_grad]
    whole = batch(0)
    learner.step(0, [whole], whole.num_labelled)
    after = [p for p in learner.model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_half_of_a_saved_state_is_refused_when_it_is_put_back(optim):
    """And not by the step after, which would find a moment missing."""
    learner = make_learner(config(method="full", optim=optim), make_llama(), CPU)
    whole = batch(0)
    learner.step(0, [whole], whole.num_labelled)
    parameter, saved = next(iter(learner.optimizer.state.items()))
    half = {name: value for name, value in saved.items() if name != "exp_avg_sq"}
    with pytest.raises((UserError, KeyError)):  # a checkpoint's reader makes one of the other
        place_state(learner.optimizer, parameter, half)
    place_state(learner.optimizer, parameter, saved)


class Asked(TorchDispatchMode):
    """Operations for whose answer the CPU would wait if their tensors were on a GPU."""

    WAITING = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.is_nonzero.default,
    )

    def __init__(self, counters):
        super().__init__()
        self.counters, self.seen = counters, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.WAITING:
            counters = [counter.untyped_storage().data_ptr() for counter in self.counters()]
            self.seen += [] if args[0].untyped_storage().data_ptr() in counters else [func]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name", ["LISA", "slices", "full", "checkpointing", "8 bits", "slices, step in backward", "slices, factored"]
)
def test_a_step_waits_for_the_device_once(name, monkeypatch):
    """For loss and norm together, which are then on the CPU, as counters of steps are.

    And once in each forward pass: transformers asks whether rows are packed.
    """
    settings = config(**named(name).settings)
    learner = make_learner(settings, make_llama().to(getattr(torch, settings.dtype)), CPU)
    learner.model.train()
    copied = []
    monkeypatch.setattr("lisatune.learner.on_host", lambda *scalars: copied.append(on_host(*scalars)) or copied[-1])

    def on_the_cpu():
        states = learner.optimizer.state.values()
        return [
            *(value for scalars in copied for value in scalars),
            *(state[name] for state in states for name in ("step", "turns") if name in state),
        ]

    for step in range(2):
        whole = batch(step)
        micros, num_labelled = [whole.to(CPU)], whole.num_labelled
        with Asked(on_the_cpu) as asked:
            learner.step(step, micros, num_labelled)
        assert asked.seen == [torch.ops.aten._local_scalar_dense.default]
    assert len(copied) == 2
