"""Settings of the run's steps: how many, how large, what is bad, and when they are saved."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from lisatune.settings.row import row
from lisatune.settings.task import SFT


class BadSteps(BaseModel):
    """Bad steps."""

    on_bad_step: Literal["stop", "skip"] = row(
        "stop",
        "What happens if the loss or the gradient norm is not finite, or the norm exceeds bad_grad_norm: stop the run, or "
        "skip the batch.",
        never_with={
            "optimizer_in_backward": "which has updated weights before the step is known to be bad",
            "frozen_learning_rate": "which has moved weights before the step is known to be bad",
        },
        tasks=SFT,
    )
    bad_grad_norm: float | None = row(None, "A gradient norm above this makes a step bad.", gt=0, tasks=SFT)


class Saving(BaseModel):
    """Checkpoints."""

    save_steps: int | None = row(None, "Save a checkpoint every so many steps.", ge=1, free=True)
    save_minutes: float | None = row(
        None, "Save a checkpoint every so many minutes. 10 if save_steps is not given either.", gt=0, free=True
    )
    save_total_limit: int = row(2, "Number of checkpoints that are kept. The oldest are deleted.", ge=1, free=True)


class Steps(BaseModel):
    """Length and batch."""

    max_steps: int | None = row(None, "Optimizer steps. Without it, num_train_epochs decides.", ge=1)
    num_train_epochs: float = row(
        1.0, "Passes over the data, if max_steps is not given.", gt=0,
        only_with={"max_steps=null": "has no effect with max_steps: give one of them"},
    )  # fmt: skip
    per_device_train_batch_size: int = row(8, "Rows of a micro-batch.", ge=1, ladder=6, pulled=None)
    gradient_accumulation_steps: int = row(1, "Micro-batches of an optimizer step.", ge=1)
