"""The settings of a run: every one named, typed and checked before anything is loaded. Needs no torch."""

from __future__ import annotations

import os
import re
import reprlib
import unicodedata
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lisatune.common.files import write_whole
from lisatune.errors import UserError, did_you_mean

Method = Literal["lisa", "fixed", "badam", "lora", "full", "mezo"]
Tracker = Literal["none", "tensorboard", "wandb", "trackio"]
UNPRINTED = ("Cc", "Cs", "Zl", "Zp")  # categories: control, half of a surrogate pair, line and paragraph separator


class TrainConfig(BaseModel):
    """A training run. Names follow TRL's ``SFTConfig`` and transformers where they have one.

    The paper's symbols: gamma is ``num_active``, K is ``interval_steps``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    model: str = Field(min_length=1, description="Folder, .gguf file, or hub name of the model to train.")
    data: str = Field(min_length=1, description="File, folder, or hub name of the rows to train on.")
    output: str = Field(min_length=1, description="Folder of the run; may hold one only to go on with it.")

    @field_validator("output")
    @classmethod
    def _expand_home(cls, output: str) -> str:
        return os.path.expanduser(output)

    method: Method = Field(
        "lisa",
        description="lisa; fixed (the same layers always); badam (lisa, a layer at a time by sweeps, embedding and head "
        "frozen); lora (peft); full (every parameter in every step); mezo (zeroth-order, no backward pass).",
    )
    num_active: int = Field(
        2, ge=0, description="Decoder layers that train at a time, beside embedding and head (gamma)."
    )
    interval_steps: int = Field(20, ge=1, description="Optimizer steps between draws of the layers (K).")
    sampler: str = Field(
        "uniform",
        description="How layers are drawn: uniform, bernoulli, sweep, round_robin, fixed, weighted, gradient_norm.",
    )
    sampler_options: dict[str, Any] = Field(
        {}, description="Of the sampler, for example {weights: weights.json}, {layers: [0, 5]} or {temperature: 0.5}."
    )
    sampled_unit: Literal["layers", "halves", "modules", "slices"] = Field(
        "layers",
        description="What is drawn: decoder layers, their attention and MLP halves, single matrices (MISA), or a block of rows "
        "of every matrix (slices).",
    )
    num_slices: int = Field(
        15, ge=1, description="Blocks that each matrix is cut into, of which num_active train at a time."
    )
    train_norms: bool | Literal["sampled"] = Field(
        True,
        description="Of slices: train norms and biases whole in every step, never (false), or in slices (sampled).",
    )
    embedding_lr_ratio: float = Field(
        1.0,
        gt=0,
        description="Learning rate of the embedding, as a multiple of learning_rate. Of a tied pair, of both.",
    )
    head_lr_ratio: float | None = Field(
        None, gt=0, description="The same for the head; 1 if not given, and that of the embedding if it is tied to it."
    )
    norm_lr_ratio: float = Field(1.0, gt=0, description="The same for norms and biases.")
    inverse_chance: bool = Field(
        False,
        description="Divide a drawn layer's updates by its chance to be drawn, so that they are those of full on average.",
    )
    inactive_learning_rate: float | None = Field(
        None,
        gt=0,
        description="Let frozen layers take small plain gradient steps at this rate, from gradients of activations that are there anyway.",
    )
    state_policy: Literal["reset_layers", "reset_all", "keep"] = Field(
        "reset_layers",
        description="Optimizer state at a switch: drop the frozen layers', drop all, or keep it on the CPU.",
    )
    train_embedding: bool | Literal["sampled"] = Field(
        True,
        description="False freezes the embedding, and the backward pass ends at the lowest active layer; sampled draws it like a layer.",
    )
    train_head: bool | Literal["sampled"] = Field(
        True, description="The same for the head. Of a tied pair, both take the same value."
    )
    decoder_name: str | None = Field(
        None, description="Dotted path of the decoder layers, where they are not recognised."
    )

    lora_r: int = Field(16, ge=1, description="Rank of the adapters.")
    lora_alpha: float = Field(32, gt=0, description="Scale of the adapters, times 1/lora_r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapters.")
    lora_target_modules: str | list[str] = Field(
        "all-linear", description="Modules that get adapters, as peft names them."
    )

    lora_use_rslora: bool = Field(False, description="Scale by 1/sqrt(lora_r) instead of 1/lora_r (rsLoRA).")
    lora_use_dora: bool = Field(False, description="Learn magnitude and direction apart (DoRA).")

    mezo_epsilon: float = Field(1e-3, gt=0, description="How far a probe of mezo moves the weights.")
    mezo_directions: int = Field(1, ge=1, description="Directions that mezo probes in a step, two losses each.")

    optim: Literal["adamw", "adamw_16bit", "adamw_8bit", "sign", "sgd", "lars", "lamb", "adafactor", "muon"] = Field(
        "adamw",
        description="AdamW with moments of 32, 16 or 8 bits (the short ones are rounded stochastically); sign (the gradient's "
        "sign, no state); or another.",
    )
    momentum: float | None = Field(None, ge=0, lt=1, description="Of sgd and lars (0.9 if not given) and muon (0.95).")
    adapt_vectors: bool = Field(
        False, description="lars and lamb: scale the steps of norms and biases by their norms too."
    )
    learning_rate: float = Field(5e-5, gt=0, description="Peak learning rate.")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field("linear", description="Shape after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay, on matrices only.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")
    max_grad_norm: float = Field(1.0, ge=0, description="Global norm that gradients are clipped to; 0 does not clip.")

    on_bad_step: Literal["stop", "skip"] = Field(
        "stop",
        description="If loss or gradient norm are not finite, or the norm exceeds bad_grad_norm: stop, or leave the batch out.",
    )
    bad_grad_norm: float | None = Field(None, gt=0, description="A gradient norm beyond this makes a step bad.")

    save_steps: int | None = Field(None, ge=1, description="A checkpoint every so many steps.")
    save_minutes: float | None = Field(
        None, gt=0, description="A checkpoint every so many minutes; 10 if save_steps is not given either."
    )
    save_total_limit: int = Field(2, ge=1, description="Checkpoints that are kept, the newest.")

    max_steps: int | None = Field(None, ge=1, description="Optimizer steps; without it, num_train_epochs decides.")
    num_train_epochs: float = Field(1.0, gt=0, description="Passes over the data, where max_steps is not given.")
    per_device_train_batch_size: int = Field(8, ge=1, description="Rows of a micro-batch.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Micro-batches of an optimizer step.")

    max_length: int = Field(
        1024, ge=2, description="Tokens of a row; longer chats lose their end, longer texts are split."
    )
    packing: bool = Field(False, description="Fill rows with several documents, kept apart in attention and positions.")
    completion_only_loss: bool = Field(
        True, description="Learn answers alone; False learns prompts too. Text is learnt whole."
    )
    streaming: bool = Field(False, description="Read rows as they are needed, instead of all at the start.")
    dataset_config: str | None = Field(None, description="Configuration of a hub data set that has several.")
    dataset_split: str = Field("train", description="Split of a hub data set.")

    eval_data: str | dict[str, str] | None = Field(
        None,
        description="Held-out rows of their own; or several, {math: FILE, general: FILE}, of which the first counts.",
    )
    eval_rows: int = Field(
        0, ge=0, description="Rows held out of the data; with eval_data, how many of it are used (0: all)."
    )
    eval_steps: int | None = Field(
        None, ge=1, description="Held-out loss every so many steps, not only at start and end."
    )
    eval_tasks: str | list[str] | None = Field(
        None, description="Tasks of lm-evaluation-harness that the model is scored on, for example gsm8k,mmlu."
    )
    eval_every: int | None = Field(
        None, ge=1, description="Scores on eval_tasks every so many steps, not only at start and end."
    )
    eval_limit: int = Field(32, ge=1, description="Documents of each of eval_tasks, the first.")
    eval_data_dir: str | None = Field(
        None, min_length=1, description="Folder with the data of eval_tasks (gsm8k/, mmlu/, ...), instead of the hub."
    )

    dp_shard_size: int = Field(
        1,
        ge=1,
        description="Processes that share one copy of the weights: 1 gives each its own (data parallel), all of them split it "
        "(FSDP), a number between makes copies of split ones (hybrid).",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Type of the weights; auto is bfloat16 on a GPU, float32 on a CPU. In bfloat16 updates are rounded stochastically.",
    )
    gradient_checkpointing: bool | Annotated[int, Field(ge=1)] = Field(
        False,
        description="Compute activations twice to hold fewer: of all decoder layers, or of so many, from the lowest.",
    )
    activation_offloading: bool = Field(
        False, description="Keep the inputs of checkpointed layers in host memory. For a GPU."
    )
    vocabulary_blocks: bool = Field(
        False, description="Make and use the gradients of embedding and head a block of rows at a time, never whole."
    )
    optimizer_in_backward: bool = Field(
        False, description="Update each weight as soon as its gradient is there; needs max_grad_norm=0."
    )
    offload_optimizer: bool = Field(
        False, description="Keep optimizer state in host memory, and bring it a block at a time. For a GPU."
    )
    offload_frozen: bool = Field(
        False, description="Keep frozen decoder layers in host memory, and bring them one at a time. For a GPU."
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")
    full_determinism: bool = Field(
        False, description="The same bits in every run on a GPU too, with slower kernels; a CPU gives them anyway."
    )
    trust_remote_code: bool = Field(False, description="Run code that the model's folder brings along.")
    seed: int = Field(0, ge=0, description="Of the layers drawn, the data's order, and the dropout.")
    log_to: Tracker = Field("none", description="Hand the metrics to tensorboard, wandb or trackio as well.")
    norm_steps: int | None = Field(
        None, ge=1, description="A line of each layer's norms in norms.jsonl every so many steps, for lisatune norms."
    )
    logging_steps: int = Field(1, ge=1, description="A line in metrics.jsonl every so many steps.")


LAYERWISE: tuple[Method, ...] = ("lisa", "fixed", "badam")  # train some layers at a time
FIRST_ORDER: tuple[Method, ...] = (*LAYERWISE, "lora", "full")
OUR_OPTIMS = ("adamw", "adamw_16bit", "adamw_8bit", "sign")

ONLY_FOR: dict[str, tuple[Method, ...]] = {
    **dict.fromkeys(("num_active", "interval_steps", "state_policy", "train_embedding", "train_head"), LAYERWISE),
    **dict.fromkeys(("sampler", "sampler_options", "sampled_unit", "inverse_chance", "inactive_learning_rate"), LAYERWISE),
    **dict.fromkeys(("embedding_lr_ratio", "head_lr_ratio", "norm_lr_ratio"), (*LAYERWISE, "full")),
    **dict.fromkeys([n for n in TrainConfig.model_fields if n.startswith("lora_")], ("lora",)),
    **dict.fromkeys(("mezo_epsilon", "mezo_directions"), ("mezo",)),
    **dict.fromkeys(
        (
            "optim", "momentum", "adapt_vectors", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
            "gradient_checkpointing", "activation_offloading", "vocabulary_blocks", "optimizer_in_backward",
            "offload_optimizer", "offload_frozen",
        ),
        FIRST_ORDER,
    ),
}  # fmt: skip

TASK_SETTINGS = ("eval_every", "eval_limit", "eval_data_dir")  # that play a part with eval_tasks alone

ONLY_FOR_SLICES = ("num_slices", "train_norms")

ONLY_FOR_OPTIM = {"momentum": ("sgd", "lars", "muon"), "adapt_vectors": ("lars", "lamb")}

# what a method is, where it is LISA with other settings; the user's own win
PRESETS: dict[str, dict[str, Any]] = {
    "fixed": {"sampler": "fixed"},
    "badam": {"sampler": "sweep", "num_active": 1, "train_embedding": False, "train_head": False},
}

# what is usual for a unit that is drawn; a method's settings and the user's own win
UNIT_PRESETS: dict[str, dict[str, Any]] = {
    "slices": {
        "sampler": "sweep", "num_active": 1, "interval_steps": 1, "train_embedding": "sampled", "train_head": "sampled",
    },
}  # fmt: skip

SLICES_SAMPLERS = ("sweep", "uniform", "round_robin", "fixed")


def _on_cpu(config: TrainConfig) -> str:
    return (
        "has no effect on a CPU, where host and device are one memory: leave it out" if config.device == "cpu" else ""
    )


def _nothing_in_blocks(config: TrainConfig) -> str:
    if config.method == "lora":
        return "has no effect with method=lora, which trains neither embedding nor head: leave it out"
    both = config.train_embedding is False and config.train_head is False
    if config.sampled_unit == "slices" and config.train_embedding is not True and config.train_head is not True:
        return "has no effect with sampled_unit=slices, which makes the gradients of a few rows alone: leave it out"
    return "has no effect while embedding and head are frozen: leave it out" if both else ""


def _not_in_backward(config: TrainConfig) -> str:
    if config.max_grad_norm:
        return (
            "cannot clip by the global norm, which is known only when all weights are updated: set max_grad_norm=0, or "
            "leave it out"
        )
    if config.gradient_accumulation_steps > 1:
        return (
            "cannot add up micro-batches, whose gradients are gone: set gradient_accumulation_steps=1, or leave it out"
        )
    return ""


def _needs_checkpoints(config: TrainConfig) -> str:
    if config.gradient_checkpointing is False:
        return "moves the inputs of checkpointed layers: set gradient_checkpointing=true, or leave it out"
    return _on_cpu(config)


def _not_streamed(config: TrainConfig) -> str:
    if config.method == "full":
        return "has no effect with method=full, where no layer is frozen: leave it out"
    if config.sampled_unit == "slices":
        return "has no effect with sampled_unit=slices, where no layer is frozen: leave it out"
    if config.state_policy == "keep":
        return "cannot go with state_policy=keep, whose moments follow layers that have not moved yet: choose another"
    if config.gradient_checkpointing is not True:
        return "needs gradient_checkpointing=true, or the backward pass would keep every layer on the device"
    return _on_cpu(config)


def _repeats_anyway(config: TrainConfig) -> str:
    return (
        "has no effect on a CPU, where equal runs give equal bits anyway: leave it out"
        if config.device == "cpu"
        else ""
    )


# why a lever that is pulled would have no effect, or cannot work; nothing if all is well
REFUSALS: dict[str, Callable[[TrainConfig], str]] = {
    "vocabulary_blocks": _nothing_in_blocks,
    "optimizer_in_backward": _not_in_backward,
    "activation_offloading": _needs_checkpoints,
    "offload_optimizer": _on_cpu,
    "offload_frozen": _not_streamed,
    "full_determinism": _repeats_anyway,
}


def build_config(settings: Mapping[str, Any]) -> TrainConfig:
    """Check ``settings`` and fill in what they leave out; null is as if a setting were left out, so it takes one back.

    Raises: UserError for a misspelt or missing name, a value out of range, or a setting that would have no effect.
    Example:
        >>> build_config({"model": "m", "data": "d", "output": "o", "num_active": "4"}).num_active
        4
        >>> build_config({"model": "m", "data": "d", "output": "o", "num_activ": 4})
        Traceback (most recent call last):
        lisatune.errors.UserError: unknown setting 'num_activ'; did you mean 'num_active'?
    """
    for name in settings:
        if name not in TrainConfig.model_fields:
            hint = did_you_mean(name, TrainConfig.model_fields) if isinstance(name, str) else ""
            raise UserError(f"unknown setting {_shown(name)}{hint}")
    settings = {name: value for name, value in settings.items() if value is not None}
    try:
        method = settings.get("method")
        unit = settings.get("sampled_unit")
        preset = UNIT_PRESETS.get(unit, {}) if isinstance(unit, str) else {}
        preset = preset | (PRESETS.get(method, {}) if isinstance(method, str) else {})
        config = TrainConfig.model_validate(preset | dict(settings))
    except ValidationError as error:
        raise UserError(_in_words(error)) from error
    for name, value in config:
        if isinstance(settings.get(name), bool) and type(value) in (int, float):
            raise UserError(f"{name}={settings[name]}: input should be a number")  # pydantic takes true for 1
        _refuse_unusable(name, value)
    _refuse_without_effect(config, settings)
    return config


def _in_words(error: ValidationError) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "the configuration"
    if first["type"] == "missing":
        return f"{name} is missing: give --{name} or '{name}:' in the config file"
    return f"{name}={_shown(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _shown(value: Any) -> str:
    """``repr(value)``, cut: a YAML alias can make it endless."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 120
    short.maxlevel = 2
    try:
        return short.repr(value)
    except ValueError:  # of int, which writes no more than 4,300 digits
        return "a number of too many digits"


def _refuse_unusable(name: str, value: Any, depth: int = 0) -> None:
    """Refuse what has the right type, and yet no run could use or write down."""
    if isinstance(value, dict | list) and depth < 4:
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            _refuse_unusable(name, inner, depth + 1)
    elif isinstance(value, str):
        if any(unicodedata.category(letter) in UNPRINTED for letter in value):
            raise UserError(f"{name}={_shown(value)} holds a character that cannot be printed: leave it out")
        if re.search(r"://[^/\s]*@", value):
            raise UserError(
                f"{name} holds a user name or password, which would be written into the run's folder: give a local path "
                "or a hub name, and log in to the hub beforehand"
            )
    elif value is not None and not (isinstance(value, int | float) and -(2**63) <= value < 2**63):
        raise UserError(
            f"{name}={_shown(value)}: input should be finite numbers, words, true or false, nested a little"
        )


def _refuse_without_effect(config: TrainConfig, settings: Mapping[str, Any]) -> None:
    for name, methods in ONLY_FOR.items():
        if name in settings and config.method not in methods:
            raise UserError(
                f"{name} has no effect with method={config.method}: leave it out, or set method={methods[0]}"
            )
    for name in ONLY_FOR_SLICES:
        if name in settings and config.sampled_unit != "slices":
            raise UserError(
                f"{name} has no effect with sampled_unit={config.sampled_unit}: leave it out, or set slices"
            )
    if config.method in LAYERWISE:
        _check_sampling(config)
    if config.method in LAYERWISE and config.sampled_unit == "slices":
        _check_slices(config)
    _check_optim(config, settings)
    for name, needed in REFUSALS.items():
        if getattr(config, name) and (reason := needed(config)):
            raise UserError(f"{name} {reason}")
    if config.on_bad_step == "skip" and config.optimizer_in_backward:
        raise UserError(
            "on_bad_step=skip cannot go with optimizer_in_backward, which has updated weights before the step is known "
            "to be bad: leave one of them out"
        )
    if isinstance(config.eval_data, dict):
        bad = next((n for n in config.eval_data or [""] if not re.fullmatch(r"[A-Za-z][\w-]*", n)), None)
        if bad is not None:
            raise UserError(f"eval_data names a set {_shown(bad)}: give it a word, as in {{math: FILE, general: FILE}}")
    if config.eval_steps and not (config.eval_data or config.eval_rows):
        raise UserError("eval_steps has no effect without held-out rows: give eval_data=<file> or eval_rows=<number>")
    for name in TASK_SETTINGS:
        if name in settings and not config.eval_tasks:
            raise UserError(f"{name} has no effect without eval_tasks: give eval_tasks=<tasks>, or leave it out")
    if config.eval_tasks and config.offload_frozen:
        raise UserError(
            "eval_tasks cannot go with offload_frozen, whose layers are not on the device when an answer is made: leave one "
            "of them out, and score the trained model with lisatune eval"
        )
    if config.streaming and not config.max_steps:
        raise UserError("streaming needs max_steps: the length of a stream is not known beforehand")
    if config.streaming and config.eval_rows and not config.eval_data:
        raise UserError("streaming cannot hold rows out of the data: give eval_data=<file>")
    if "num_train_epochs" in settings and config.max_steps:
        raise UserError("num_train_epochs has no effect beside max_steps: give one of them")
    if config.max_steps and config.warmup_steps >= config.max_steps:
        raise UserError(
            f"warmup_steps={config.warmup_steps} leaves nothing of max_steps={config.max_steps}: make it smaller"
        )


# what works on one process alone, until it is made to work on several
ON_ONE_PROCESS: dict[str, tuple[Any, ...]] = {
    "method": ("mezo",),
    "sampler": ("gradient_norm",),
    "sampled_unit": ("slices",),
    "state_policy": ("keep",),
    "optim": ("adamw_8bit", "sign", "sgd", "lars", "lamb", "adafactor", "muon"),
    **dict.fromkeys(
        (
            "inverse_chance", "activation_offloading", "vocabulary_blocks", "optimizer_in_backward", "offload_optimizer",
            "offload_frozen", "lora_use_dora",
        ),
        (True,),
    ),
}  # fmt: skip


def check_num_ranks(config: TrainConfig, num_ranks: int) -> None:
    """Refuse what does not work on so many processes.

    Raises: UserError naming the setting.
    """
    if num_ranks % config.dp_shard_size:
        raise UserError(
            f"dp_shard_size={config.dp_shard_size} does not divide the {num_ranks} processes that were started: choose 1, "
            f"{num_ranks} or a divisor"
        )
    if num_ranks == 1:
        return
    used = used_settings(config)
    refused = [name for name, values in ON_ONE_PROCESS.items() if used.get(name) in values]
    refused += [name for name in ("inactive_learning_rate", "norm_steps", "eval_tasks") if used.get(name) is not None]
    if refused:
        name = refused[0]
        raise UserError(f"{name}={used[name]} works on one process alone: leave it out, or start one")


def _check_sampling(config: TrainConfig) -> None:
    if config.num_active == 0:
        raise UserError("num_active is 0, so no decoder layer would ever train: choose at least 1")
    if config.sampler == "gradient_norm" and config.optimizer_in_backward:
        raise UserError(
            "sampler=gradient_norm cannot go with optimizer_in_backward, after which no gradient is left to look at: "
            "leave one of them out"
        )
    if config.inactive_learning_rate:
        for name in ("offload_frozen", "optimizer_in_backward"):
            if getattr(config, name):
                raise UserError(f"inactive_learning_rate cannot go with {name}: leave one of them out")
        if config.gradient_accumulation_steps > 1:
            raise UserError(
                "inactive_learning_rate moves frozen layers in each backward pass, so micro-batches would meet other "
                "weights: set gradient_accumulation_steps=1, or leave it out"
            )
        if config.on_bad_step == "skip":
            raise UserError(
                "on_bad_step=skip cannot go with inactive_learning_rate, which has moved weights before the step is known "
                "to be bad: leave one of them out"
            )
    if config.inverse_chance and config.optimizer_in_backward:
        raise UserError(
            "inverse_chance cannot go with optimizer_in_backward, which updates before the step: leave one of them out"
        )


def _check_slices(config: TrainConfig) -> None:
    if config.sampler not in SLICES_SAMPLERS:
        raise UserError(
            f"sampler={config.sampler} cannot draw slices, of which each matrix needs the same number: choose "
            f"{', '.join(SLICES_SAMPLERS)}"
        )
    if config.num_active > config.num_slices:
        raise UserError(
            f"num_active is {config.num_active}, but there are {config.num_slices} slices: choose at most that many"
        )
    for name in ("inverse_chance", "inactive_learning_rate"):
        if getattr(config, name):
            raise UserError(f"{name} cannot go with sampled_unit=slices: leave it out, and set learning_rate itself")


def _check_optim(config: TrainConfig, settings: Mapping[str, Any]) -> None:
    for name, optims in ONLY_FOR_OPTIM.items():
        if name in settings and config.optim not in optims:
            raise UserError(f"{name} has no effect with optim={config.optim}: leave it out, or set optim={optims[0]}")
    if config.optim in OUR_OPTIMS:
        return
    for lever in ("offload_optimizer", "optimizer_in_backward", "vocabulary_blocks"):
        if getattr(config, lever):
            raise UserError(
                f"{lever} needs an optimizer that works on blocks: set optim to one of {', '.join(OUR_OPTIMS)}"
            )


def read_settings(path: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """The settings of a YAML file, then those of ``key=value`` words, which win.

    Example:
        >>> read_settings(None, ["learning_rate=5e-4", "packing=true"])
        {'learning_rate': 0.0005, 'packing': True}
    """
    settings: dict[str, Any] = {}
    if path is not None:
        settings |= _read_yaml(Path(path))
    for word in overrides:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise UserError(f"'{word}' is not of the form key=value, for example learning_rate=5e-4")
        settings[name.strip()] = _value(value)
    return settings


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = _load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # not there, not text, or no name that a file can have
        raise UserError(f"config file {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise UserError(
            f"config file {path}{place}: not valid YAML ({getattr(error, 'problem', None) or error}); mend it"
        ) from error
    if not isinstance(loaded, dict):
        raise UserError(f"config file {path} must hold 'name: value' lines")
    return loaded


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, for names that stand once: PyYAML would let the last one win in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        names = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag == "tag:yaml.org,2002:merge":
                # merges of merges can fill the memory from a few lines, and a list of settings has no use for them
                raise yaml.constructor.ConstructorError(None, None, "<< is not for settings", key.start_mark)
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is given twice", key.start_mark)
            names.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def _load_yaml(text: str) -> Any:
    """What ``yaml.safe_load`` gives; raises nothing but ``yaml.YAMLError``."""
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except RecursionError as error:
        raise yaml.YAMLError("nested too deep") from error
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        # PyYAML's own, for a value that is not what its form or its tag says, such as the date 2024-99-99
        raise yaml.YAMLError(f"a value is not what its form says, {error}") from error


def _value(text: str) -> Any:
    """YAML's reading of ``text``, and numbers such as 5e-4, which YAML 1.1 takes for words."""
    try:
        value = _load_yaml(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str) and value == text:  # quotes say that it is no number
        try:
            return float(value)
        except ValueError:
            return text
    return value


# may differ between stop and resume, because they change no weight (but for rounding)
FREE = ("dp_shard_size", "output", "log_to", "save_steps", "save_minutes", "save_total_limit", "trust_remote_code")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings in which a run would not go on as it began, in words.

    Example:
        >>> differences({"seed": 0, "output": "a"}, {"seed": 1, "output": "b"})
        ['seed=1 (was 0)']
    """
    names = [name for name in TrainConfig.model_fields if name not in FREE and before.get(name) != now.get(name)]
    return [f"{name}={now.get(name)} (was {before.get(name)})" for name in names]


def used_settings(config: TrainConfig) -> dict[str, Any]:
    """All settings that play a part, the defaults too."""
    settings = config.model_dump()
    for name, methods in ONLY_FOR.items():
        if config.method not in methods:
            del settings[name]
    for name, optims in ONLY_FOR_OPTIM.items():
        if config.optim not in optims:
            settings.pop(name, None)
    if config.sampled_unit != "slices":
        settings = {name: value for name, value in settings.items() if name not in ONLY_FOR_SLICES}
    if config.max_steps:
        del settings["num_train_epochs"]
    if not config.eval_tasks:
        settings = {name: value for name, value in settings.items() if name not in TASK_SETTINGS}
    return settings


def write_config(config: TrainConfig, path: Path) -> None:
    """Write ``used_settings``, so that ``lisatune train --config`` repeats the run."""
    write_whole(path, yaml.safe_dump(used_settings(config), sort_keys=False, allow_unicode=True))
