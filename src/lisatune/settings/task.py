"""Settings of the task: answers to learn, or answers that were judged."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel

from lisatune.settings.row import OneOf, row
from lisatune.tasks import TASKS

SFT = ("sft",)  # tasks of the settings that TRL's trainers do not have


class Task(BaseModel):
    """Task."""

    task: Annotated[str, OneOf(TASKS)] = row(
        "sft",
        "What is learned. sft: answers. dpo and orpo: which of two answers is better. kto: whether an answer is good. "
        "reward: a model that gives answers a score. All but sft use TRL.",
        choices=TASKS.__getitem__, one_value=True,
        never_with={"method=mezo": "which has a loss of its own"},
        needs={
            "num_active!=0": "needs something to sample: set num_active=1 or more",
            "task!=reward or save_merged": "saves a whole model, because its head is new: leave save_merged out",
            "task!=kto or per_device_train_batch_size!=1": "compares answers within a micro-batch: set "
            "per_device_train_batch_size=2 or more",
        },
    )  # fmt: skip
    beta: float = row(
        0.1, "How strongly the trained model is held to its reference. In orpo, the weight of the preference.", gt=0,
        tasks=("dpo", "kto", "orpo"),
    )  # fmt: skip
    precompute_ref_log_probs: bool = row(
        False, "Let the model itself compute the reference's log-probabilities before training. No second copy is held then.",
        tasks=("dpo", "kto"), idle_with={"method=lora": "whose reference is the model without its adapters"},
    )  # fmt: skip
