"""The settings of a run: every one named, typed and checked before anything is loaded. Needs no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from lisatune.settings.data import Data, Places
from lisatune.settings.evaluation import Evaluation
from lisatune.settings.machine import Machine
from lisatune.settings.memory import Memory
from lisatune.settings.methods import Lora, Mezo, Sampling
from lisatune.settings.optim import Optim
from lisatune.settings.row import Row, row_of
from lisatune.settings.steps import BadSteps, Saving, Steps
from lisatune.settings.task import Task

# they are listed and written in this order
GROUPS: tuple[type[BaseModel], ...] = (
    Places, Task, Sampling, Lora, Mezo, Optim, BadSteps, Saving, Steps, Data, Evaluation, Memory, Machine,
)  # fmt: skip


# bases in reverse order: pydantic lists the fields of the last one first
class TrainConfig(
    Machine, Memory, Evaluation, Data, Steps, Saving, BadSteps, Optim, Mezo, Lora, Sampling, Task, Places
):  # fmt: skip
    """A training run. Names follow TRL's ``SFTConfig`` and transformers where they have one.

    The paper's symbols: gamma is ``num_active``, K is ``interval_steps``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @property
    def peak_rate(self) -> float:
        """``learning_rate``, from the moment on when the model is known: see ``assemble.settle_rate``."""
        if self.learning_rate is None:
            raise ValueError("learning_rate was left open, and no model has settled it")
        return self.learning_rate


ROWS: dict[str, Row] = {name: row_of(field) for name, field in TrainConfig.model_fields.items()}


def heading(group: type[BaseModel]) -> str:
    """What a group of settings is called: the first line of its docstring, without the full stop."""
    return (group.__doc__ or "").splitlines()[0].removesuffix(".")
