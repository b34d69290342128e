"""What a run says of effective rates and of units that never train."""

import pytest
import torch

from lisatune.assemble import make_learner
from lisatune.run.coverage import describe_coverage, hint_at_unknown_text, turns
from lisatune.samplers.uniform import UniformSampler
from lisatune.settings import build_config
from tiny import make_llama

NEEDED = {"model": "m", "data": "d", "output": "o", "device": "cpu", "learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "full"}, []),
        (
            {"method": "full", "embedding_lr_ratio": 0.1, "norm_lr_ratio": 2},
            ["effective learning rates: layers 0.001, embedding 0.0001, head 0.001, norms 0.002"],
        ),
        (
            {"num_active": 1, "interval_steps": 5},
            [
                "sampled: 1 of 4 decoder layers, every 5 steps (uniform)"
                "; set sampled_unit=slices for slices, which are the default where no setting of layers is given",
                "effective learning rates: layers 0.00025 (0.001 in 25% of steps), embedding 0.001, head 0.001",
                "15 steps are few for 4 decoder layers: 2 will never train, and 1 will train in one interval only; fewer interval_steps or "
                "a larger num_active or sampler=sweep would reach them",
            ],
        ),
        (
            {"recipe": "paper", "interval_steps": 1},
            [
                "sampled: 2 of 4 decoder layers, every step (uniform)",
                "effective learning rates: layers 0.0005 (0.001 in 50% of steps), embedding 0.001, head 0.001",
            ],
        ),
        (
            {"num_slices": 20, "sampled_unit": "slices"},
            [
                "sampled: 1 of 20 slices of each matrix, every step (sweep)",
                "effective learning rates: layers 5e-05 (0.001 in 5% of steps), embedding 5e-05 (0.001 in 5% of steps), "
                "head 5e-05 (0.001 in 5% of steps)",
                "15 steps are few for 20 slices: 5 will never train, and 15 will train in one interval only; a smaller num_slices would reach "
                "them",
            ],
        ),
        ({"method": "fixed"}, ["sampled: 2 of 4 decoder layers, every 20 steps (fixed)", "effective learning rates: layers 0.0005 (0.001 in 50% of steps), embedding 0.001, head 0.001"]),
        (
            {"sampled_unit": "slices", "num_slices": 10, "train_head": True, "head_lr_ratio": 0.1},
            [
                "sampled: 1 of 10 slices of each matrix, every step (sweep)",
                "effective learning rates: layers 0.0001 (0.001 in 10% of steps), embedding 0.0001 (0.001 in 10% of steps), "
                "head 0.0001",
                "15 steps are few for 10 slices: 5 will train in one interval only",
            ],
        ),
    ],
)  # fmt: skip
def test_it_says_how_far_parts_move_and_what_never_trains(settings, said):
    config = build_config(NEEDED | settings)
    learner = make_learner(config, make_llama(), torch.device("cpu"))
    assert describe_coverage(config, learner, num_steps=15) == said


def test_turns_are_those_that_the_engine_will_take():
    sampler = UniformSampler(30, 2, seed=1)
    drawn = [unit for interval in range(14) for unit in sampler(interval)]
    assert turns(sampler, 14) == [min(2, drawn.count(unit)) for unit in range(30)]


@pytest.mark.parametrize(
    ("settings", "loss", "tries"),
    [
        ({"sampled_unit": "slices"}, 6.2, ["optim=spectral"]),
        ({"sampled_unit": "slices", "num_slices": 15}, 6.2, ["optim=spectral", "train_embedding=true"]),
        ({"sampled_unit": "slices"}, 4.8, None),
        ({"sampled_unit": "slices"}, None, None),
        ({"sampled_unit": "slices", "train_embedding": True, "train_head": True}, 6.2, ["optim=spectral"]),
        ({"sampled_unit": "slices", "optim": "spectral"}, 6.2, None),
        ({"sampled_unit": "slices", "num_slices": 15, "optim": "spectral"}, 6.2, ["train_embedding=true"]),
        ({"sampled_unit": "slices", "optim": "spectral", "train_embedding": True, "train_head": True}, 6.2, None),
        ({"recipe": "paper"}, 6.2, None),
    ],
)
def test_who_trains_slices_of_a_model_that_does_not_know_the_text_is_told(settings, loss, tries):
    config = build_config(NEEDED | settings)
    hint = hint_at_unknown_text(config, make_learner(config, make_llama(), torch.device("cpu")).engine, loss)
    assert (hint is None) == (tries is None)
    for word in ("optim=spectral", "train_embedding=true"):
        assert (word in (hint or "")) == (word in (tries or []))
