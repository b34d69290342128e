"""Settings of the evaluation while training: held-out loss and task scores."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, field_validator

from lisatune.errors import UserError, shown
from lisatune.settings.row import row
from lisatune.settings.task import SFT

# what is best, is known where it is evaluated between start and end
BETWEEN = {
    "eval_tasks=null and eval_steps and eval_data or eval_tasks=null and eval_steps and eval_rows or eval_tasks and "
    "eval_tasks_steps": "has no effect without evaluations while training: give eval_steps=<number> and held-out rows, or "
    "with eval_tasks eval_tasks_steps=<number>",
}
WITH_TASKS = {"eval_tasks": "has no effect without eval_tasks: give eval_tasks=<tasks>, or leave it out"}


class Evaluation(BaseModel):
    """Evaluation while training."""

    eval_data: str | dict[str, Any] | None = row(
        None,
        "Held-out rows of their own: a path, or {path: DIR, split: test, config: main, rows: 0.05}. "
        "Or several with names, {math: FILE, general: FILE}; the first one is compared.",
        one_value=True, place=True,
    )  # fmt: skip
    eval_rows: int | float = row(
        0, "Rows held out of the data: their number, or their share (0.05). With eval_data: how many of its rows are used "
        "(0: all).", ge=0,
        one_value=True,
    )  # fmt: skip
    eval_steps: int | None = row(
        None, "Held-out loss every so many steps, besides start and end.", ge=1, one_value=True,
        needs={
            "eval_data or eval_rows or samples": "has no effect without held-out rows or samples: give eval_data=<file>, "
            "eval_rows=<number> or samples"
        },
    )  # fmt: skip
    eval_tasks: str | list[str] | None = row(
        None, "Tasks of lm-evaluation-harness on which the model is scored, for example gsm8k,mmlu.",
        one_value=True, whole=True,
        never_with={
            "offload_frozen": "which keeps layers off the device: leave one of them out, and score the trained model with "
            "lisatune eval",
            "frozen_bits": "which keeps exact layers off the device: leave one of them out, and score the trained model with "
            "lisatune eval",
        }, tasks=SFT,
    )  # fmt: skip
    eval_tasks_steps: int | None = row(
        None, "Scores on eval_tasks every so many steps, besides start and end.", ge=1, one_value=True,
        only_with=WITH_TASKS, was="eval_every", tasks=SFT,
    )  # fmt: skip
    eval_limit: int = row(
        32,
        "Number of documents of each task. The first ones are used.",
        ge=1,
        one_value=True,
        only_with=WITH_TASKS,
        tasks=SFT,
    )
    eval_data_dir: str | None = row(
        None, "Folder with the data of eval_tasks (gsm8k/, mmlu/, ...), instead of the hub.", min_length=1,
        one_value=True, only_with=WITH_TASKS, tasks=SFT,
    )  # fmt: skip

    samples: str | list[str] | None = row(
        None, "A prompt, or a list of prompts, that the model answers before training and at each evaluation, greedily. The answers "
        "are in samples.jsonl.",
        min_length=1, free=True, whole=True,
        never_with={
            "offload_frozen": "whose layers are not on the device when an answer is made",
            "frozen_bits": "whose exact layers are not on the device when an answer is made",
        }, tasks=SFT,
    )  # fmt: skip
    early_stopping: int | None = row(
        None, "Stop after this number of evaluations in a row without a new best. keep_best says what is best.",
        ge=1, needs=BETWEEN, tasks=SFT,
    )  # fmt: skip
    keep_best: bool = row(
        False, "The trained model is the best one that was evaluated, and the last one is in a checkpoint. The best has the highest "
        "mean score on eval_tasks, or without them the lowest held-out loss.",
        needs=BETWEEN, tasks=SFT,
    )  # fmt: skip

    @field_validator("eval_data")
    @classmethod
    def _name_by_words(cls, eval_data: Any) -> Any:
        if isinstance(eval_data, dict) and "path" not in eval_data:
            bad = next((name for name in eval_data or [""] if not re.fullmatch(r"[A-Za-z][\w-]*", name)), None)
            if bad is not None:
                raise UserError(f"eval_data: {shown(bad)} must be one word, as in {{math: FILE, general: FILE}}")
        return eval_data
