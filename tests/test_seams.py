"""Methods and levers: their arguments are settings, and a step asks them in one order."""

from dataclasses import dataclass, field, fields

import pytest

from lever_steps import CPU, batch, config
from lisatune import assemble
from lisatune.assemble import make_learner
from lisatune.learner import Learner
from lisatune.levers import LEVERS
from lisatune.levers.base import Lever
from lisatune.methods import METHODS, UNITS
from lisatune.methods.full import Full
from lisatune.settings import TrainConfig
from tiny import make_llama

CLASSES = [*LEVERS.values(), *(choice.load() for choice in [*METHODS.values(), *UNITS.values()])]


@pytest.mark.parametrize("kind", dict.fromkeys(CLASSES))
def test_each_argument_is_a_setting(kind):
    assert {one.name for one in fields(kind) if one.init} <= TrainConfig.model_fields.keys()


def test_each_lever_is_put_on_by_a_setting():
    assert LEVERS.keys() <= TrainConfig.model_fields.keys()


@dataclass(kw_only=True)
class Recorded(Lever):
    """Writes down when it is asked."""

    gradient_checkpointing: bool | int
    calls: list = field(init=False, default_factory=list)

    def on_model(self, layers):
        self.calls.append("on_model")

    def put_on(self, learner):
        self.calls.append("put_on")
        assert isinstance(learner, Learner)
        assert self in learner.levers

    def after_switch(self, learner):
        self.calls.append(f"after_switch {learner.engine.active}")

    def before_step(self, learner, number):
        self.calls.append(f"before_step {number}")

    def also_trains(self, learner):
        return {"outside"}


def test_a_lever_is_asked_at_each_point(monkeypatch):
    """A lever of one's own is a class and a line: nothing else of the package knows it."""
    monkeypatch.setitem(LEVERS, "gradient_checkpointing", Recorded)
    learner = make_learner(config(gradient_checkpointing=2, num_active=1, interval_steps=2), make_llama(), CPU)
    (lever,) = learner.levers
    assert lever.gradient_checkpointing == 2
    for step in range(3):
        whole = batch(step)
        learner.step(step, [whole], whole.num_labelled)
    first, second = (learner.engine.active_at(step) for step in (0, 2))
    assert lever.calls == [
        "on_model", "put_on", f"after_switch {first}", "before_step 0", "before_step 1", f"after_switch {second}",
        "before_step 2",
    ]  # fmt: skip
    assert learner.trained_at["outside"] == 2


@dataclass(kw_only=True)
class Halved(Full):
    """Full fine-tuning at half the gradient."""

    seed: int

    def gradients(self, learner, micro_batches, num_labelled):
        loss, norm = super().gradients(learner, micro_batches, num_labelled)
        for parameter in learner.model.parameters():
            parameter.grad *= 0.5
        return loss, norm


def test_a_method_of_ones_own_takes_part_in_the_step(monkeypatch):
    """SGD at half the gradient is SGD at half the rate, to the bit: both are a factor of 2."""
    results = []
    for kind, rate in [(Full, 0.5), (Halved, 1.0)]:
        monkeypatch.setattr(assemble, "method_of", lambda *_, kind=kind: kind)
        learner = make_learner(
            config(method="full", optim="sgd", momentum=0.0, weight_decay=0.0, learning_rate=rate), make_llama(), CPU
        )
        whole = batch(0)
        assert not learner.step(0, [whole], whole.num_labelled).bad
        results.append([parameter.detach().clone() for parameter in learner.model.parameters()])
    assert all((a == b).all() for a, b in zip(*results, strict=True))
