"""Compiled decoder layers: the plain step to rounding, and no kernel more at a switch."""

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from lever_steps import CPU, batch, config
from lisatune import UserError
from lisatune.assemble import make_learner
from lisatune.levers import torch_compile
from lisatune.settings import build_config
from tiny import make_llama

# torch's tracer looks at .grad of what a layer is given; it tells nobody in a run
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture
def traced_alone(monkeypatch):
    """Trace layers as ever, and run the graphs as they are: what is compiled is counted, in a tenth of the time."""
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_with(f, backend="eager", **options))
    torch_compile._kernel.cache_clear()
    torch._dynamo.reset()
    yield
    torch_compile._kernel.cache_clear()
    torch._dynamo.reset()


def step_both(steps=7, **settings):
    """Steps of the plain and the compiled way, each from equal weights: their outcomes and weights; kernels after each."""
    given = {"num_active": 1, "interval_steps": 1, "adam_epsilon": 1.0} | settings
    plain, fast = (make_learner(config(torch_compile=on, **given), make_llama(), CPU) for on in (False, True))
    made, before = [], counters["stats"]["unique_graphs"]
    for step in range(steps):
        fast.model.load_state_dict(plain.model.state_dict())
        whole, outcomes = batch(step, tokens=12 + step % 3), []
        for learner in (plain, fast):
            learner.model.train()
            outcomes.append(learner.step(step, whole.split(2), whole.num_labelled))
        assert outcomes[1].loss.item() == pytest.approx(outcomes[0].loss.item(), rel=1e-5)
        assert outcomes[1].grad_norm.item() == pytest.approx(outcomes[0].grad_norm.item(), rel=1e-4)
        for one, other in zip(plain.model.parameters(), fast.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        made.append(counters["stats"]["unique_graphs"] - before)
    return made


@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}, {"method": "full"}], ids=str)
def test_a_step_is_the_plain_one_and_a_switch_compiles_nothing(more, traced_alone):
    """Two kernels: of a layer that trains, and of a frozen one. Each step here is a switch, and rows have three lengths."""
    if "method" in more:
        more = more | {"num_active": None, "interval_steps": None}
    made = step_both(**more)
    assert made[-1] == (1 if "method" in more else 2)
    assert made[0] == made[-1]


def test_below_the_lowest_active_layer_there_is_a_third(traced_alone):
    assert step_both(train_embedding=False, train_head=False)[-1] == 3


@pytest.mark.slow
def test_the_compiler_itself_gives_that_too():
    assert step_both(gradient_checkpointing=True)[-1] == 2


def test_evaluations_use_the_layers_as_they_are(traced_alone):
    learner = make_learner(config(torch_compile=True, num_active=1), make_llama(), CPU)
    before = counters["stats"]["unique_graphs"]
    learner.model.eval()
    learner.layers.trunk(input_ids=torch.tensor([[1, 2, 3]]))
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "torch_compile needs decoder layers, or their halves, that train or not as a whole: set recipe=paper"),
        ({"recipe": "paper", "full_determinism": True}, "which promises bits that no compiler does"),
        ({"recipe": "paper", "frozen_learning_rate": 0.1}, "which looks inside of a layer"),
    ],
)
def test_what_cannot_be_compiled_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        build_config({"model": "m", "data": "d", "output": "o", "torch_compile": True} | settings)
