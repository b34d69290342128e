"""Slices of weights that lie in shards: the weights are those of one process."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lisatune.errors import UserError
from lisatune.layers import find_layers
from lisatune.optim.factored import factored_state
from lisatune.samplers.sweep import SweepSampler
from lisatune.slices.engine import SliceEngine
from places import HELPERS
from slices_of_ranks import MODELS, weights_after
from torchrun import torchrun

OF = [{"slices_of": of, "train_norms": norms} for of, norms in (("columns", "sampled"), ("rows", True))]
WHOLE = {"slices_of": "columns", "train_embedding": True, "train_head": True}


def case(model, engine, shard_size, num_active=1, dtype="float32", factored=False):
    return {
        "model": model, "engine": engine, "shard_size": shard_size, "num_active": num_active, "dtype": dtype,
        "factored": factored,
    }  # fmt: skip


def cases(num_ranks):
    found = [case(model, engine, num_ranks) for model in MODELS for engine in OF]
    found += [case("tied", WHOLE, num_ranks), case("untied", OF[0] | {"slow": True}, num_ranks)]
    found += [case("untied", engine, num_ranks, num_active=2) for engine in OF]
    cut = [engine | {"train_norms": "sampled"} for engine in OF]
    found += [case(model, engine, num_ranks, factored=True) for model in ("tied", "gpt2", "mixtral") for engine in cut]
    found += [case("untied", engine, 2) for engine in OF if num_ranks > 2]  # two copies of shards
    return [*found, *(case("untied", engine, num_ranks, dtype="bfloat16") for engine in OF)]


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_weights_are_those_of_one_process(tmp_path, num_ranks):
    """131 tokens, 3 experts and 3 blocks: nothing divides evenly, and some processes hold nothing of a block."""
    every = cases(num_ranks)
    (tmp_path / "cases.json").write_text(json.dumps(every))
    torchrun(num_ranks, HELPERS / "slices_of_ranks.py", tmp_path / "cases.json")
    for number, one in enumerate(every):
        alone, start = weights_after(one, 1), MODELS[one["model"]]().state_dict()
        shards = load_file(tmp_path / f"{number}.safetensors")
        assert alone.keys() == shards.keys()
        assert shards["trained"] == alone["trained"]
        moved = 0
        for name, weight in alone.items():
            far = (shards[name].float() - weight.float()).abs().max()
            bound = 2e-6 if one["dtype"] == "float32" else 0  # 2e-7 was seen; bfloat16 has the noise of the element
            assert far <= bound, f"{one}: {name} by {far}"
            moved += name in start and not torch.equal(weight, start[name].to(weight.dtype))
        assert moved > len(start) / 2


def test_shards_that_somebody_else_sums_are_refused():
    """FSDP2 by itself divides by the number of processes, and a slice knows nothing of it."""
    from torch.distributed.fsdp import fully_shard

    from lisatune.plan.fake_processes import fake_processes

    with fake_processes(2):
        model = MODELS["untied"]().to("meta")
        fully_shard(model)
        with pytest.raises(UserError, match="slices of weights in shards train by `lisatune train` alone"):
            SliceEngine(find_layers(model), SweepSampler(3, 1))
        with pytest.raises(UserError, match="a weight in shards has no factored second moment"):
            factored_state(next(model.parameters()))
