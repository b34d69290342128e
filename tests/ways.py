"""The table of ways to train: one row for each choice. A row inherits the tests that every choice must pass.

- ``tests/test_learner.py``: the weights are those of a plainer way, to the bit
- ``tests/plan/test_forecast.py``: the forecast is what the allocator gives out
- ``tests/run/test_resume.py``: the loss falls, and a stopped run is resumed to the bit
- ``tests/settings/test_refusals_of_ways.py``: what it is refused with
- ``tests/processes/test_processes_train.py``: several processes train as one does
"""

from dataclasses import dataclass, field
from typing import Any

import pytest

from lisatune.settings import ROWS


@dataclass(frozen=True)
class Way:
    """One way to train.

    Args:
        name: Says what is chosen.
        settings: The choice; what else a run needs is added by each test.
        bit_equal_to: Settings of a plainer way that ends with the same weights; None if there is none.
        also_with: Methods with which that must be so too.
        forecast_within: How far the forecast may be from the allocator's peak; None if another row holds as much, or
            it cannot be measured on a CPU.
        resumes: Whether a stopped run can be resumed to the bit.
        falls: By how much the held-out loss falls at least in 14 steps; less than half of what was seen.
        processes: Pairs of a number of processes and a ``dp_shard_size`` with which whole runs train as on one process;
            empty if that is not tried; None if it needs whole weights. ``tests/processes/test_copies.py`` tries that.
        more: Settings of the test with several processes alone; ``tied`` is a model whose embedding is its head.
    """

    name: str
    settings: dict[str, Any]
    bit_equal_to: dict[str, Any] | None = None
    also_with: tuple[str, ...] = ()
    forecast_within: float | None = 0.01
    resumes: bool = True
    falls: float = 0.3
    processes: tuple[tuple[int, int], ...] | None = ()
    more: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def is_for_gpu(self) -> bool:
        """Whether whole runs refuse it on a CPU; a learner does not."""
        return any(ROWS[name].gpu for name in self.settings)

    def skip_if_missing(self) -> None:
        """Skip the test where the package that this way needs is not installed."""
        if self.settings.get("method") == "lora":
            pytest.importorskip("peft", reason="the extra 'lora' is not installed")


SLICES = {"sampled_unit": "slices", "slices_of": "rows", "num_slices": 3, "num_active": 1}
SPECTRAL = SLICES | {"interval_steps": 1, "optim": "spectral", "learning_rate": 3e-3}
COLUMNS = SLICES | {"slices_of": "columns"}
CHECKPOINTED = {"gradient_checkpointing": True}
SAME: dict[str, Any] = {"forecast_within": None}  # it holds what another row holds
OFF_THE_DEVICE: dict[str, Any] = {"forecast_within": None, "processes": None}  # a CPU has one memory
BFLOAT16: dict[str, Any] = {"forecast_within": 0.02}  # a CPU's kernels take scratch; 0.988 of the peak was seen
UNCLIPPED = {"max_grad_norm": 0}
OTHERS = ("lora", "full")
ONE = {"num_active": 1, "interval_steps": 1}

WAYS = [
    # methods
    Way("LISA", {}, processes=((2, 1), (2, 2), (4, 2), (4, 4))),
    Way("all layers", {"num_active": 4, "interval_steps": 2}, bit_equal_to={"method": "full"}),
    Way("fixed", {"method": "fixed", "num_active": 2}, bit_equal_to={"sampler": "fixed", "num_active": 2}),
    Way(
        "BAdam", {"method": "badam", "interval_steps": 2},
        bit_equal_to={"sampler": "sweep", "interval_steps": 2, "train_embedding": False, "train_head": False}, **SAME, falls=0.1),
    Way("LoRA", {"method": "lora"}, processes=((2, 2),), more={"max_steps": 4}, falls=0.15),
    Way("LoRA with dropout", {"method": "lora", "lora_dropout": 0.2}, **SAME, falls=0.15),
    Way("DoRA", {"method": "lora", "lora_use_dora": True}, processes=None, falls=0.15),
    Way("rsLoRA", {"method": "lora", "lora_use_rslora": True}, **SAME, falls=0.1),
    Way(
        "full", {"method": "full", "lr_scheduler_type": "cosine", "warmup_steps": 3},
        processes=((2, 1),), more={"max_steps": 4},
    ),
    Way("MeZO", {"method": "mezo", "learning_rate": 1e-4}, processes=None, falls=0.0),
    # samplers
    Way("every step another set", ONE, **SAME),
    Way("bernoulli", {"sampler": "bernoulli"}),
    Way("sweep", {"sampler": "sweep"}, **SAME),
    Way("round robin", {"sampler": "round_robin", "sampler_options": {"descending": True}}, **SAME),
    Way("weighted", {"sampler": "weighted", "sampler_options": {"weights": [1, 2, 3, 4]}}),
    Way("gradient norms", {"sampler": "gradient_norm", "num_active": 1, "interval_steps": 2}, processes=None),
    # what is sampled, and what else trains
    Way("halves", {"sampled_unit": "halves"}, processes=((2, 2),), more={"packing": True, "max_steps": 4}),
    Way("modules", {"sampled_unit": "modules", "num_active": 6}),
    Way("slices", SLICES | {"interval_steps": 1}, processes=((2, 1), (2, 2), (4, 1), (4, 2), (4, 4))),
    Way("slices of columns", COLUMNS | {"interval_steps": 1}, processes=((2, 1), (2, 2), (4, 2), (4, 4)), more={"max_steps": 4}),
    Way(
        "slices of columns with moments",
        COLUMNS | {"num_active": 2, "interval_steps": 4, "dtype": "bfloat16", "optim": "adamw_8bit", "train_norms": "sampled"},
        processes=None, **BFLOAT16,
    ),
    Way(
        "slices of columns, step in backward", COLUMNS | UNCLIPPED | {"interval_steps": 1, "optimizer_in_backward": True},
        processes=None,
    ),
    Way("slices of columns, spectral", COLUMNS | SPECTRAL, processes=None),
    Way(
        "slices with moments",
        SLICES | {"num_active": 2, "interval_steps": 4, "dtype": "bfloat16", "optim": "adamw_8bit", "train_norms": "sampled"},
        processes=None, **BFLOAT16,
    ),
    Way(
        "slices, moments kept", SLICES | {"state_policy": "keep", "train_embedding": True, "train_head": True},
        processes=None, forecast_within=None,  # of moments of all slices; two steps make those of one
    ),
    Way(
        "slices, step in backward",
        SLICES | UNCLIPPED | {"interval_steps": 1, "dtype": "bfloat16", "optimizer_in_backward": True}, processes=None,
        **BFLOAT16,
    ),
    Way(
        "slices off the device", SLICES | CHECKPOINTED | {"interval_steps": 2, "train_norms": "sampled", "offload_frozen": True},
        bit_equal_to=SLICES | {"interval_steps": 2, "train_norms": "sampled"}, **OFF_THE_DEVICE,
    ),
    Way(
        "slices, frozen rows in 8 bits", SLICES | CHECKPOINTED | {"interval_steps": 4, "num_active": 2, "frozen_bits": 8},
        processes=None,  # no switch in the first steps: torch's profiler knows not of memory that was given out before
    ),
    Way(
        "slices, frozen rows in 4 bits, off the device",
        SLICES | CHECKPOINTED | {"interval_steps": 2, "frozen_bits": 4, "offload_frozen": True},
        bit_equal_to=SLICES | CHECKPOINTED | {"interval_steps": 2, "frozen_bits": 4}, **OFF_THE_DEVICE,
    ),
    Way("embedding sampled", {"train_embedding": "sampled", "num_active": 1}, processes=((2, 2),)),
    Way(
        "embedding and head sampled", {"train_embedding": "sampled", "train_head": "sampled", "num_active": 1},
        processes=((2, 2),), more=CHECKPOINTED | {"model": "tied"},
    ),
    Way("embedding and head frozen", {"train_embedding": False, "train_head": False}, falls=0.15),
    # optimizers and their state
    Way("bfloat16", {"dtype": "bfloat16"}, **BFLOAT16),
    Way("16 bits", {"dtype": "bfloat16", "optim": "adamw_16bit"}, processes=((2, 2),), more={"max_steps": 4}, **BFLOAT16),
    Way("8 bits", {"dtype": "bfloat16", "optim": "adamw_8bit"}, processes=None, **BFLOAT16),
    Way("compiled", {"dtype": "bfloat16", "optim_compile": True}, **BFLOAT16),
    Way("moments kept", {"state_policy": "keep", "num_active": 1}, processes=None),
    Way("moments kept in 8 bits", {"state_policy": "keep", "num_active": 1, "optim": "adamw_8bit"}, processes=None),
    Way("all moments reset", {"state_policy": "reset_all"}, **SAME),
    Way("sign", {"optim": "sign", "learning_rate": 3e-3}, processes=None),
    Way("factored", {"optim": "factored", "learning_rate": 3e-3}, processes=None),
    Way("factored in bfloat16, step in backward", UNCLIPPED | {"optim": "factored", "learning_rate": 3e-3, "dtype": "bfloat16", "optimizer_in_backward": True},
        processes=None, bit_equal_to=UNCLIPPED | {"optim": "factored", "learning_rate": 3e-3, "dtype": "bfloat16"}, **BFLOAT16),
    Way("slices, factored", COLUMNS | {"interval_steps": 1, "optim": "factored", "learning_rate": 3e-3}, processes=((2, 1), (2, 2), (4, 2))),
    Way(
        "slices, factored, step in backward", COLUMNS | UNCLIPPED | {"interval_steps": 1, "optim": "factored", "optimizer_in_backward": True},
        processes=None, bit_equal_to=COLUMNS | UNCLIPPED | {"interval_steps": 1, "optim": "factored"},
    ),
    Way("spectral", {"optim": "spectral", "learning_rate": 3e-3}, processes=None),
    Way("slices, spectral", SPECTRAL, processes=None),
    Way(
        "slices, spectral, step in backward", SPECTRAL | UNCLIPPED | {"optimizer_in_backward": True}, processes=None,
        bit_equal_to=SPECTRAL | UNCLIPPED,
    ),
    Way("SGD", {"optim": "sgd", "learning_rate": 0.5}, processes=None),
    Way("LARS", {"optim": "lars", "learning_rate": 0.1}, processes=None),
    Way("LAMB", {"optim": "lamb"}, processes=None, falls=0.1),
    Way("Adafactor", {"optim": "adafactor"}, processes=None, falls=0.08),
    Way("Muon", {"optim": "muon", "dtype": "bfloat16"}, processes=None, **BFLOAT16),
    # levers
    Way("checkpointing", CHECKPOINTED, bit_equal_to={}, also_with=OTHERS),
    Way("some checkpointed", {"gradient_checkpointing": 2}, bit_equal_to={}, also_with=OTHERS),
    Way(
        "inputs off the device", CHECKPOINTED | {"activation_offloading": True}, bit_equal_to={}, also_with=OTHERS,
        forecast_within=None,
    ),
    Way("moments off the device", {"offload_optimizer": True}, bit_equal_to={}, also_with=OTHERS, **OFF_THE_DEVICE),
    Way(
        "frozen layers off the device", CHECKPOINTED | {"offload_frozen": True}, bit_equal_to={}, also_with=("lora",),
        **OFF_THE_DEVICE,
    ),
    Way(
        "kept moments of 8 bits off the device",
        {"offload_optimizer": True, "optim": "adamw_8bit", "state_policy": "keep", "num_active": 1},
        bit_equal_to={"optim": "adamw_8bit", "state_policy": "keep", "num_active": 1}, **OFF_THE_DEVICE,
    ),
    Way(
        "all off the device",
        CHECKPOINTED | {"activation_offloading": True, "offload_optimizer": True, "offload_frozen": True},
        bit_equal_to={}, also_with=("lora",), **OFF_THE_DEVICE,
    ),
    Way(
        "LoRA off the device", CHECKPOINTED | {"method": "lora", "offload_frozen": True, "dtype": "bfloat16"},
        bit_equal_to={"method": "lora", "dtype": "bfloat16"}, **OFF_THE_DEVICE,
    ),
    Way("frozen layers in 8 bits", CHECKPOINTED | {"frozen_bits": 8}, processes=None),
    Way(
        "frozen layers in 4 bits, off the device", CHECKPOINTED | {"frozen_bits": 4, "offload_frozen": True},
        bit_equal_to=CHECKPOINTED | {"frozen_bits": 4}, also_with=("lora",), **OFF_THE_DEVICE,
    ),
    Way("QLoRA", CHECKPOINTED | {"method": "lora", "frozen_bits": 4, "dtype": "bfloat16"}, processes=None, **BFLOAT16),
    Way(
        "step in backward", UNCLIPPED | {"optimizer_in_backward": True}, bit_equal_to=UNCLIPPED, also_with=OTHERS,
        processes=None,
    ),
    Way("vocabulary in blocks", {"vocabulary_blocks": True, "gradient_checkpointing": 2}, processes=None),
    Way("vocabulary in blocks, 8 bits", {"vocabulary_blocks": True, "optim": "adamw_8bit"}, processes=None),
    Way("halves, divided by chance", {"sampled_unit": "halves", "inverse_chance": True}, processes=None),
    Way(
        "small steps of frozen layers", {"num_active": 1, "frozen_learning_rate": 0.1, "dtype": "bfloat16"},
        processes=None, **BFLOAT16),
    # data
    Way(
        "NEFTune on packed rows in order",
        {"neftune_noise_alpha": 5.0, "shuffle": False, "packing": True, "per_device_train_batch_size": 2},
    ),
    Way("accumulation", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}),
    Way("rows of like length", {"group_by_length": True, "per_device_train_batch_size": 2}, **SAME, processes=((2, 1),)),
    Way("packing", {"packing": True, "per_device_train_batch_size": 2}, **SAME),
    Way("stream", {"streaming": True, "eval_rows": None}, **SAME),
    Way("packed stream", {"streaming": True, "packing": True, "eval_rows": None, "per_device_train_batch_size": 2}, **SAME),
]  # fmt: skip


def named(name: str) -> Way:
    """The way of that name."""
    return next(way for way in WAYS if way.name == name)
