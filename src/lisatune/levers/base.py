"""What a lever is: a technique that is put on from outside, and what it does at each point of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from lisatune.errors import UserError
from lisatune.layers import Layers
from lisatune.processes.collectives import num_ranks

if TYPE_CHECKING:
    from lisatune.learner import Learner


@dataclass(kw_only=True)
class Lever:
    """Does nothing at any point.

    A lever is a subclass in a file of its own, and a line in ``LEVERS``. It replaces the functions that it needs. Its
    arguments are settings, by their names. It is on if the setting that ``LEVERS`` names is.

    Attributes:
        needs_our_adamw: Whether it works with ``lisatune.AdamW`` alone, so that PyTorch's must not take its place.
    """

    needs_our_adamw: ClassVar[bool] = False

    def on_model(self, layers: Layers) -> None:
        """Change the model before its weights go to the device."""

    def put_on(self, learner: Learner) -> None:
        """Change the learner, whose parts are all there now. No step was made yet."""

    def after_switch(self, learner: Learner) -> None:
        """Parameters were frozen or thawed."""

    def before_step(self, learner: Learner, number: int) -> None:
        """Optimizer step ``number`` (from 0) begins. Its learning rate is set."""

    def check_experts(self, learner: Learner, setting: str) -> None:
        """Refuse experts of which a process may have no gradient, while the others wait for it to sum one.

        Raises: UserError on several processes, if experts are modules by themselves.
        """
        found = any(isinstance(m, nn.ModuleList) and "experts" in n for n, m in learner.layers.model.named_modules())
        if found and num_ranks() > 1:
            raise UserError(
                f"{setting} on several processes needs a gradient of every weight on each of them, and the experts of "
                f"{type(learner.layers.model).__name__} may have none: leave it out, or start one process"
            )

    def also_trains(self, learner: Learner) -> set[str]:
        """Parts that change in a step although they are frozen."""
        return set()
