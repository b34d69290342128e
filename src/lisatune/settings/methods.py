"""Settings of the method: which layers train, and LoRA's and MeZO's own."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, model_validator

from lisatune.methods import METHODS, RECIPES, UNITS
from lisatune.samplers import SAMPLERS, check_options, find_sampler
from lisatune.settings.row import OneOf, row
from lisatune.settings.task import SFT

LAYERWISE = tuple(name for name, method in METHODS.items() if method.layerwise)
FIRST_ORDER = tuple(name for name, method in METHODS.items() if method.backward)

# no slice trains for longer than a step: whatever an optimizer would remember of it, is dropped
NOT_FORGOTTEN = (
    "sampled_unit!=slices or interval_steps!=1 or num_slices<=num_active or sampler=fixed or state_policy=keep or "
    "train_embedding=true or train_head=true"
)

# a factored second moment is of all slices together, and never dropped
IN_FACTORS = "state_policy!=keep or sampled_unit!=slices or optim!=factored and optim!=spectral"

WITH_SLICES = {"sampled_unit=slices": "has no effect with sampled_unit={sampled_unit}: leave it out, or set slices"}
NO_SLICES = {"sampled_unit=slices": ": leave it out, and set learning_rate itself"}


class Sampling(BaseModel):
    """Method, and which layers it trains."""

    method: Annotated[str, OneOf(METHODS)] = row(
        "lisa",
        "lisa samples what trains. fixed trains the same layers always. badam is lisa with one layer at a time, by sweeps, and "
        "embedding and head frozen. lora trains adapters (peft). full trains every parameter in every step. mezo is "
        "zeroth-order: it needs no backward pass.",
        choices=METHODS.__getitem__,
    )
    recipe: Annotated[str, OneOf(RECIPES)] = row(
        "auto",
        "What lisa is where you leave it open. auto: slices, the best that is known at this memory; layers, if you set "
        "num_active, interval_steps or the sampler. paper: LISA as published.",
        methods=("lisa",), free=True,
        needs={"sampled_unit=layers": "samples decoder layers, as published: leave sampled_unit out, or leave recipe out"},
    )  # fmt: skip
    num_active: int = row(
        2, "Number of decoder layers that train at a time (gamma). Embedding and head train with them.", ge=0,
        methods=LAYERWISE,
        needs={
            "num_active!=0": "is 0, so no decoder layer would ever train: choose at least 1",
            "sampled_unit!=slices or num_active<=num_slices": "is {num_active}, but there are {num_slices} slices: choose "
            "at most that many",
        },
    )  # fmt: skip
    interval_steps: int = row(20, "Optimizer steps until new layers are sampled (K).", ge=1, methods=LAYERWISE)
    sampler: str = row(
        "uniform",
        f"How layers are sampled: {', '.join(SAMPLERS)}; or MODULE:CLASS, a class of your own.",
        methods=LAYERWISE, choices=find_sampler,
        never_with={
            "optimizer_in_backward and sampler.learns": "which leaves no gradient to look at",
        },
        needs={
            "sampled_unit!=slices or sampler.for_slices": "cannot sample slices: "
            f"choose {', '.join(name for name, kind in SAMPLERS.items() if kind.for_slices)}",
        },
    )  # fmt: skip
    sampler_options: dict[str, Any] = row(
        {},
        "Options of the sampler, for example {weights: weights.json}, {layers: [0, 5]} or {temperature: 0.5}.",
        methods=LAYERWISE,
    )
    sampled_unit: Annotated[str, OneOf(UNITS)] = row(
        "layers",
        "What is sampled (the default depends on recipe): decoder layers, their attention and MLP halves, single matrices (MISA), or a slice of "
        "every matrix (slices).",
        methods=LAYERWISE, choices=UNITS.__getitem__,
    )  # fmt: skip
    num_slices: int | None = row(
        None,
        "Blocks that each matrix is cut into. num_active of them train at a time. The default is 15, or half of the number of "
        "decoder layers if that is less.",
        ge=1, only_with=WITH_SLICES,
    )  # fmt: skip
    slices_of: Literal["rows", "columns"] = row(
        "rows",
        "What a slice of a decoder layer's matrix is made of. Columns need only their share of a linear layer's input. "
        "Slices of embedding and head are always rows. The default of lisatune train is columns, or rows with offload_frozen and frozen_bits.",
        only_with=WITH_SLICES, never_with={"frozen_bits": "whose scales are of rows", "offload_frozen": "which moves rows to the device and back"},
    )  # fmt: skip
    train_norms: bool | Literal["sampled"] = row(
        False,
        "With slices: true trains norms and biases whole in every step, sampled in slices. It keeps the input of each norm.",
        only_with=WITH_SLICES,
    )
    embedding_lr_ratio: float = row(
        1.0,
        "Learning rate of the embedding, as a multiple of learning_rate. If the head is tied to it, the head has it too.",
        gt=0, methods=(*LAYERWISE, "full"),
    )  # fmt: skip
    head_lr_ratio: float | None = row(
        None,
        "The same for the head. The default is 1, or embedding_lr_ratio if the head is tied to the embedding.",
        gt=0, methods=(*LAYERWISE, "full"),
    )  # fmt: skip
    norm_lr_ratio: float = row(
        1.0, "The same for norms and biases.", gt=0, methods=(*LAYERWISE, "full"),
        only_with={
            "sampled_unit!=slices or train_norms=true or train_norms=sampled": "has no effect while norms are frozen: set "
            "train_norms=true, or leave it out",
        },
    )  # fmt: skip
    inverse_chance: bool = row(
        False,
        "Divide the updates of a sampled layer by its chance to be sampled. On average they are then those of full.",
        methods=LAYERWISE, whole=True,
        never_with={"optimizer_in_backward": "which updates before the step"} | NO_SLICES, tasks=SFT,
    )  # fmt: skip
    frozen_learning_rate: float | None = row(
        None,
        "Let frozen layers take small plain gradient steps at this rate, from gradients of activations that exist anyway.",
        gt=0, methods=LAYERWISE, whole=True, was="inactive_learning_rate",
        never_with={"offload_frozen": "", "frozen_bits": "", "optimizer_in_backward": ""} | NO_SLICES,
        needs={
            "gradient_accumulation_steps=1": "moves frozen layers in each backward pass, so the next micro-batch would see other "
            "weights: set gradient_accumulation_steps=1, or leave it out",
        }, tasks=SFT,
    )  # fmt: skip
    frozen_step: Literal["gradient", "sign"] = row(
        "gradient",
        "What the small steps of frozen layers follow: the gradient, or its sign (FRUGAL), at about a tenth of learning_rate.",
        methods=LAYERWISE, only_with={"frozen_learning_rate": "has no effect without frozen_learning_rate: leave it out"}, tasks=SFT,
    )  # fmt: skip
    state_policy: Literal["reset_layers", "reset_all", "keep"] = row(
        "reset_layers",
        "Optimizer state when new layers are sampled: drop that of frozen layers, drop all, or keep it on the CPU.",
        methods=LAYERWISE, whole=("keep",),
        needs={
            IN_FACTORS: "={state_policy} has no effect with slices and optim={optim}, which keeps its moment anyway: leave it out",
        },
    )  # fmt: skip
    train_embedding: bool | Literal["sampled"] = row(
        True,
        "False freezes the embedding, and the backward pass ends at the lowest active layer. sampled samples it like a layer.",
        methods=LAYERWISE,
    )
    train_head: bool | Literal["sampled"] = row(
        True, "The same for the head. If it is tied to the embedding, both take the same value.", methods=LAYERWISE
    )
    decoder_name: str | None = row(None, "Dotted path of the decoder layers, if they are not recognised.")

    @model_validator(mode="after")
    def _check_sampler(self) -> Self:
        check_options(self.sampler, self.sampler_options)
        return self


class Lora(BaseModel):
    """LoRA."""

    lora_r: int = row(16, "Rank of the adapters.", ge=1, methods=("lora",))
    lora_alpha: float = row(32, "Scale of the adapters, times 1/lora_r.", gt=0, methods=("lora",))
    lora_dropout: float = row(0.0, "Dropout before the adapters.", ge=0, lt=1, methods=("lora",))
    lora_target_modules: str | list[str] = row(
        "all-linear", "Modules that get adapters, as peft names them.", methods=("lora",)
    )
    lora_use_rslora: bool = row(False, "Scale by 1/sqrt(lora_r) instead of 1/lora_r (rsLoRA).", methods=("lora",))
    save_merged: bool = row(
        True, "False saves the adapters alone, without a copy of the model in which they are merged.", methods=("lora",),
        free=True,
    )  # fmt: skip
    lora_use_dora: bool = row(False, "Learn magnitude and direction separately (DoRA).", methods=("lora",), whole=True)


class Mezo(BaseModel):
    """MeZO."""

    mezo_epsilon: float = row(1e-3, "How far a probe moves the weights.", gt=0, methods=("mezo",))
    mezo_directions: int = row(1, "Directions that a step probes, with two losses each.", ge=1, methods=("mezo",))
