"""Every lever, optimizer and sampler that needs whole weights, on two processes: the steps of one, to rounding."""

import json

import pytest
import torch

from lever_steps import run
from lisatune.settings import ROWS
from places import HELPERS
from torchrun import torchrun
from ways import CHECKPOINTED, WAYS

MORE = {
    "blocks, in backward": {"vocabulary_blocks": True, "optimizer_in_backward": True, "max_grad_norm": 0},
    "blocks of a tied pair": {"vocabulary_blocks": True, "tied": True},
    "LoRA of 8 bits": CHECKPOINTED | {"method": "lora", "frozen_bits": 8},
    "inputs off the device, in shards": CHECKPOINTED | {"activation_offloading": True, "dp_shard_size": 2},
    "sums in bfloat16": {"dtype": "bfloat16", "reduce_dtype": "auto"},
    "sums in bfloat16, in shards": {"dtype": "bfloat16", "reduce_dtype": "auto", "dp_shard_size": 2},
    "sign of frozen layers": {"frozen_learning_rate": 1e-3, "frozen_step": "sign"},
}
CASES = {way.name: way.settings for way in WAYS if way.processes is None} | MORE


def settings_of(name):
    """Adam divides by the root of the second moment, so where a gradient is near 0 its rounding would become an update."""
    given, row = CASES[name], ROWS["adam_epsilon"]
    reads_it = given.get("optim", "adamw") in row.optims and given.get("method", "lisa") in row.methods
    return given | {"steps": 5} | ({"adam_epsilon": 1e-3} if reads_it else {})


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    """What two processes made of all cases."""
    folder = tmp_path_factory.mktemp("two")
    cases, results = folder / "cases.json", folder / "results.pt"
    cases.write_text(json.dumps({name: settings_of(name) for name in CASES}))
    torchrun(2, HELPERS / "steps_of_ranks.py", cases, results)
    return torch.load(results, weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_steps_of_one(on_two, name):
    found = on_two[name]
    weights, told = run(**settings_of(name))
    assert found["alike"], "the processes have the same weights, to the bit"
    bound = bound_of(CASES[name])
    assert found["weights"].keys() == weights.keys()
    for (loss, norm), (theirs, norm_of_theirs) in zip(told, found["told"], strict=True):
        assert (theirs, norm_of_theirs) == (pytest.approx(loss, rel=bound), pytest.approx(norm, rel=10 * bound))
    for key, weight in weights.items():
        far = (weight.float() - found["weights"][key].float()).abs()
        assert max(far.mean(), far.max() / 20) < bound, f"{key} by {far.max():.2g}"


def bound_of(settings):
    """How far sums in another order may lead."""
    return 3e-2 if settings.get("dtype") == "bfloat16" else 2e-4
