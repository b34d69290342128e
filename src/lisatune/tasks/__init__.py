"""What is learned of the rows: answers, or which of two answers is better.

``TASKS`` is the list of tasks. A new one is a file here and a line there. All but ``sft`` are trained by TRL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lisatune.common.choice import Choice

if TYPE_CHECKING:
    from lisatune.tasks.base import Task


@dataclass(frozen=True)
class TaskChoice(Choice):
    """A task: a class, and what is true about it.

    Args:
        columns: What a row holds beside its prompt (``margin`` if it likes); empty for ``sft``, whose rows take many forms.
        preset: Settings that it takes in place of the defaults; the user's own win.
    """

    columns: tuple[str, ...] = ()
    preset: Mapping[str, Any] = field(default_factory=dict)


PAIRS = ("chosen", "rejected")
CAREFUL = {"learning_rate": 1e-6}  # the defaults of TRL

TASKS: dict[str, TaskChoice] = {
    "sft": TaskChoice("lisatune.train:train"),
    "dpo": TaskChoice("lisatune.tasks.dpo:Dpo", columns=PAIRS, preset=CAREFUL),
    "kto": TaskChoice("lisatune.tasks.kto:Kto", columns=("completion", "label"), preset=CAREFUL),
    "orpo": TaskChoice("lisatune.tasks.orpo:Orpo", columns=PAIRS, preset=CAREFUL),
    "reward": TaskChoice("lisatune.tasks.reward:Reward", columns=(*PAIRS, "margin"), preset={"learning_rate": 1e-4}),
}


def task_of(name: str) -> type[Task]:
    """The class of a task of TRL.

    Example:
        >>> task_of("dpo").__name__
        'Dpo'
    """
    kind: type[Task] = TASKS[name].load()
    return kind
