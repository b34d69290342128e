"""What a lever is: a technique that is put on from outside, and what it does at each point of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lisatune.layers import Layers

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

    def also_trains(self, learner: Learner) -> set[str]:
        """Parts that change in a step although they are frozen."""
        return set()
