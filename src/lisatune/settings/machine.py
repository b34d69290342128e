"""Settings of the machine, of chance, and of what is logged."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from lisatune.settings.row import row

Tracker = Literal["none", "tensorboard", "wandb", "trackio"]


class Machine(BaseModel):
    """Device, seed and logging."""

    device: str = row("auto", "cpu, cuda, cuda:1, ... auto takes a GPU if there is one.", one_value=True)
    full_determinism: bool = row(
        False, "Equal runs give equal bits on a CPU of any maker, and on a GPU, with slower kernels."
    )
    trust_remote_code: bool = row(False, "Run the code that the model's folder contains.", free=True, one_value=True)
    seed: int = row(0, "Seed of the sampled layers, the order of the data, and the dropout.", ge=0)
    log_to: Tracker = row("none", "Send the metrics to tensorboard, wandb or trackio as well.", free=True)
    norm_steps: int | None = row(
        None, "Write each layer's norms to norms.jsonl every so many steps, for lisatune norms.", ge=1, one_process=True
    )
    logging_steps: int = row(1, "Write a line to metrics.jsonl every so many steps.", ge=1, one_value=True)
