"""``LisaCallback`` on several processes: the weights of one process, to rounding, through every switch."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from lisatune import UniformSampler, UserError, find_layers
from lisatune.trainer.processes import check_processes
from tiny import make_llama

pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
import in_processes

from torchrun import torchrun

SCRIPT = Path(__file__).parent / "in_processes.py"
LISA = {"num_active": 1, "interval_steps": 1}  # 12 steps, 12 draws
SAMPLED = {"train_embedding": "sampled", "train_head": "sampled"}
FSDP2 = {
    "fsdp": True,
    "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "reshard_after_forward": True},
}  # fmt: skip
CASES = {
    "copies": {},
    "copies, checkpointed, sampled embedding": {"arguments": {"gradient_checkpointing": True}, "lisa": SAMPLED},
    "copies, gradient norm": {"lisa": {"sampler": "gradient_norm"}},
    "copies, tied, keep": {"model": {"tied": True}, "lisa": {"state_policy": "keep"}},
    "copies, evaluated first": {"evaluate": True},
    "copies, slices": {"lisa": {"sampled_unit": "slices", "num_slices": 4, "train_norms": True}},
    "copies, slices, norms": {"lisa": {"sampled_unit": "slices", "num_slices": 4, "train_norms": True}},
    "copies, SFT": {"trainer": "sft"},
    "copies, DPO": {"trainer": "dpo"},
    "shards": {"arguments": FSDP2, "sharded": True},
    "shards, SFT": {"arguments": FSDP2, "sharded": True, "trainer": "sft"},
    "shards, DPO": {"arguments": FSDP2, "sharded": True, "trainer": "dpo"},
    "shards, sampled embedding": {"arguments": FSDP2, "sharded": True, "lisa": SAMPLED},
}
REFUSED = {
    "on several processes LisaCallback has to be there when the Trainer is made": {"late": True, "output": "late"},
    "use_reentrant=True does not work on several processes": {
        "arguments": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "output": "reentrant",
    },
    "slices on several processes need train_norms=True": {
        "arguments": {"gradient_checkpointing": True}, "lisa": {"sampled_unit": "slices"}, "output": "slices"
    },
    "sampled_unit=slices needs whole weights in each process": {
        "arguments": FSDP2, "sharded": True, "lisa": {"sampled_unit": "slices"}, "output": "sharded slices"
    },
    "sampler=gradient_norm needs whole gradients in each process": {
        "arguments": FSDP2, "sharded": True, "lisa": {"sampler": "gradient_norm"}, "output": "sharded gradient norm"
    },
}  # fmt: skip
RESUMED = ["copies", "copies, DPO", "shards", "shards, DPO"]
ON_FOUR = ["copies", "copies, SFT", "copies, DPO", "shards", "shards, SFT", "shards, DPO"]


@pytest.fixture
def tmp_path(memory_path):
    return memory_path


def case(name, num_processes, folder, **more):
    """The same rows in each optimizer step, whatever the number of processes; an epoch ends with 3 rows in place of 4."""
    settings = CASES[name] | more
    steps = {"max_steps": 12, "gradient_accumulation_steps": 4 // num_processes}
    arguments = steps | (settings.get("arguments", {}) if num_processes > 1 else {})
    return settings | {
        "output": str(folder / f"{name} {num_processes}"), "arguments": arguments, "lisa": LISA | settings.get("lisa", {})
    }  # fmt: skip


def resumed_cases(name, folder):
    """Eight steps straight on; five; and the other three, begun with another model's weights."""
    arguments = CASES[name].get("arguments", {}) | {"max_steps": 8, "save_strategy": "steps", "save_steps": 5}
    if CASES[name].get("sharded"):
        arguments["fsdp_config"] = FSDP2["fsdp_config"] | {"state_dict_type": "SHARDED_STATE_DICT"}
    straight = CASES[name] | {"arguments": arguments, "lisa": {"num_active": 1, "interval_steps": 3}}
    straight["output"] = str(folder / f"straight {name}")
    stopped = straight | {"output": str(folder / f"stopped {name}"), "stop": 5}
    resumed = straight | {"output": str(folder / f"resumed {name}"), "model": {"seed": 1}}
    return [straight, stopped, resumed | {"resume": str(folder / f"stopped {name}" / "checkpoint-5")}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all cases on two processes have left their weights; one start of the processes for all."""
    pytest.importorskip("trl", reason="the extra 'sft' is not installed")
    folder = tmp_path_factory.mktemp("two")
    cases = [case(name, 2, folder) for name in CASES]
    for name in RESUMED:
        cases += resumed_cases(name, folder)
    cases += [settings | {"output": str(folder / settings["output"])} for settings in REFUSED.values()]
    in_processes_of(2, cases, folder)
    return folder


def in_processes_of(num_processes, cases, folder):
    (folder / "cases.json").write_text(json.dumps(cases))
    torchrun(num_processes, SCRIPT, folder / "cases.json")


def weights(folder, name):
    return load_file(folder / name / "weights.safetensors")


def told(folder, name):
    return json.loads((folder / name / "told.json").read_text())


def check_as_alone(name, num_processes, folder, tmp_path):
    """Compare with one process that sees the same rows in each step."""
    in_processes.run(case(name, 1, tmp_path, sharded=False))
    alone, together = weights(tmp_path, f"{name} 1"), weights(folder, f"{name} {num_processes}")
    assert alone.keys() == together.keys()
    for weight, value in alone.items():
        # sums in another order: 1e-7 of gradients of 1, and Adam's epsilon of 1e-3 keeps that from growing
        torch.testing.assert_close(value, together[weight], atol=2e-6, rtol=0, msg=lambda text: f"{name}: {text}")


@pytest.mark.filterwarnings("default")  # TRL warns of its own coming changes
@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_one_process(name, folder, tmp_path):
    check_as_alone(name, 2, folder, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_weights_of_four_processes_are_those_of_one(tmp_path):
    in_processes_of(4, [case(name, 4, tmp_path) for name in ON_FOUR], tmp_path)
    for name in ON_FOUR:
        check_as_alone(name, 4, tmp_path, tmp_path)


def test_frozen_layers_are_neither_sent_nor_held(folder):
    parts, sampler = find_layers(make_llama()).parts(), UniformSampler(4, 1, 0)
    in_copies, in_shards = told(folder, "copies 2"), told(folder, "shards 2")
    assert len(in_copies) == len(in_shards) == 12
    for step, (sent_bytes, held_bytes) in enumerate(in_copies):
        trained = [
            p for part in ("embedding", "norm", "head", f"layers.{sampler(step)[0]}") for p in parts[part].values()
        ]
        kept = parts["norm"]["model.norm.weight"]  # which DistributedDataParallel sends itself
        sent = sum(p.nbytes for p in trained if p is not kept)
        assert sent_bytes == sent + len(trained) - 1  # and a byte for each tensor: whether any process has a gradient
        assert held_bytes == sum(2 * p.nbytes for p in trained)
        assert in_shards[step][1] == held_bytes // 2


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_in_the_middle_of_an_interval_to_the_bit(name, folder):
    straight, resumed = weights(folder, f"straight {name}"), weights(folder, f"resumed {name}")
    assert all(torch.equal(value, resumed[weight]) for weight, value in straight.items())


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_work_is_refused(message, folder):
    assert message in (folder / REFUSED[message]["output"] / "refused.txt").read_text()


@pytest.mark.parametrize(
    ("kind", "version", "message"),
    [
        ("DEEPSPEED", None, "DeepSpeed copies all weights into flat tensors when it starts"),
        ("FSDP", 1, "FSDP1 joins the parameters of a layer into one flat tensor.* set fsdp_version: 2"),
        ("MEGATRON_LM", None, "does not work with MEGATRON_LM"),
    ],
)
def test_what_needs_a_gpu_to_begin_is_refused_by_name(kind, version, message):
    from accelerate.utils import DistributedType

    state = SimpleNamespace(distributed_type=DistributedType[kind], fsdp_plugin=SimpleNamespace(fsdp_version=version))
    with pytest.raises(UserError, match=message):
        check_processes(state)
