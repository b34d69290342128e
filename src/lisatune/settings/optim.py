"""Settings of the optimizer and its learning rate."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, field_validator, model_validator

from lisatune.errors import UserError
from lisatune.optim import OPTIMS
from lisatune.optim.schedules import SCHEDULES, check_schedule
from lisatune.settings.methods import FIRST_ORDER, NOT_FORGOTTEN
from lisatune.settings.row import OneOf, row
from lisatune.settings.task import SFT

IN_BLOCKS = {
    "optim.in_blocks": "needs an optimizer that works on blocks: set optim to one of "
    + ", ".join(name for name, optim in OPTIMS.items() if optim.in_blocks),
}


OF_MOMENTS = ("adamw", "adamw_16bit", "adamw_8bit", "lamb", "muon")


class Optim(BaseModel):
    """Optimizer and learning rate."""

    optim: Annotated[str, OneOf(OPTIMS)] = row(
        "adamw",
        "AdamW with moments of 32, 16 or 8 bits (the short ones are rounded stochastically); factored (a second moment in rows and "
        "columns, next to no state); spectral (Muon's step of what factored would take); sign (the gradient's sign, no state: what adamw is "
        "for slices that train for one step); or another.",
        methods=FIRST_ORDER, choices=OPTIMS.__getitem__,
        ladder=3, pulled="adamw_8bit",
        needs={
            f"optim!=adamw_16bit and optim!=adamw_8bit or {NOT_FORGOTTEN}": "has no effect with slices that train for "
            "one step, because they hold no optimizer state: leave it out",
        },
    )  # fmt: skip
    optim_compile: bool = row(
        False,
        "Compile the arithmetic of adamw, adamw_16bit, adamw_8bit and sign into one kernel. It needs a C++ compiler, or Triton on a GPU. "
        "Weights agree to rounding.",
        methods=FIRST_ORDER, optims=("adamw", "adamw_16bit", "adamw_8bit", "sign"), free=True, tasks=SFT,
        never_with={"full_determinism": "which promises bits that no compiler does"},
    )  # fmt: skip
    momentum: float | None = row(
        None, "Momentum of sgd and lars (0.9 if not given) and of muon (0.95).", ge=0, lt=1,
        methods=FIRST_ORDER, optims=("sgd", "lars", "muon"),
    )  # fmt: skip
    adapt_vectors: bool = row(
        False, "Scale the steps of norms and biases by their norms too.", methods=FIRST_ORDER, optims=("lars", "lamb")
    )
    learning_rate: float | None = row(
        None,
        "Peak learning rate. The default is usual for the method: 5e-5 with layers, 2e-4 with lora. With full it is 0.06 / the width of "
        "the model. With slices it is num_slices / num_active times that, and a third more with optim=spectral.",
        gt=0,
    )  # fmt: skip
    lr_scheduler_type: Annotated[str, OneOf(SCHEDULES)] = row(
        "linear", "Shape of the learning rate after the warm-up, as transformers names it."
    )
    lr_scheduler_kwargs: dict[str, Any] = row(
        {}, "Arguments of the schedule, as transformers names them: {min_lr: 1e-6}, {num_cycles: 3}, {power: 2}."
    )
    warmup_ratio: float = row(
        0.0, "Share of all steps that are warm-up.", ge=0, lt=1,
        only_with={"warmup_steps=0": "has no effect with warmup_steps: give one of them"},
    )  # fmt: skip
    warmup_steps: int = row(
        0, "Steps of linear warm-up.", ge=0,
        needs={
            "max_steps=null or warmup_steps<max_steps": "={warmup_steps} must be smaller than max_steps={max_steps}: lower it",
        },
    )  # fmt: skip
    weight_decay: float = row(0.0, "Decoupled weight decay. It acts on matrices only.", ge=0)
    neftune_noise_alpha: float | None = row(
        None, "Noise on the embedded tokens while training (NEFTune): at most this, divided by the root of a row's numbers.",
        gt=0, methods=FIRST_ORDER, tasks=SFT,
    )  # fmt: skip
    adam_beta1: float = row(0.9, "Decay of the first moment.", ge=0, lt=1, methods=FIRST_ORDER, optims=OF_MOMENTS)
    adam_beta2: float = row(
        0.999,
        "Decay of the second moment.",
        ge=0,
        lt=1,
        methods=FIRST_ORDER,
        optims=(*OF_MOMENTS, "factored", "spectral"),
    )
    adam_epsilon: float = row(
        1e-8,
        "Added to the root of the second moment.",
        gt=0,
        methods=FIRST_ORDER,
        optims=(*OF_MOMENTS, "factored", "spectral", "sign"),
    )
    max_grad_norm: float = row(
        1.0, "Global norm to which gradients are clipped. 0 does not clip.", ge=0, methods=FIRST_ORDER
    )

    @field_validator("warmup_steps", mode="before")
    @classmethod
    def _share_by_its_name(cls, given: Any) -> Any:
        if isinstance(given, float) and 0 < given < 1:  # transformers takes a share there
            raise UserError(f"warmup_steps={given}: give whole steps, or warmup_ratio={given} for a share of all steps")
        return given

    @field_validator("lr_scheduler_kwargs")
    @classmethod
    def _numbers(cls, given: dict[str, Any]) -> dict[str, Any]:
        return {name: _number(value) for name, value in given.items()}

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        check_schedule(self.lr_scheduler_type, self.lr_scheduler_kwargs)
        return self


def _number(value: Any) -> Any:
    """``value``, or the number that it spells: YAML reads 1e-6 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
