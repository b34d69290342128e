"""What a method is: which parts of a model train, and where their gradients come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lisatune.data.loader import Batch
from lisatune.engine import LisaEngine
from lisatune.layers import Layers, find_layers
from lisatune.slices.engine import SliceEngine

if TYPE_CHECKING:
    from lisatune.learner import Learner

State = dict[str, Any]  # what an optimizer holds for one parameter, by name


@dataclass(kw_only=True)
class Method:
    """Trains, in every step and by backpropagation, whatever asks for a gradient.

    Another method is a subclass in a file of its own, and a line in ``METHODS``. It replaces the functions below that
    differ. ``make_learner`` calls ``prepare``, ``start``, ``make_optimizer`` and ``adopt`` once, in this order. Each
    optimizer step calls ``begin_step``, ``gradients`` and ``observe``, in this order. ``finish`` comes last.

    The arguments of a method are settings, by their names.

    Args:
        decoder_name: Dotted path of the decoder layers, if ``find_layers`` does not find them.
    Attributes:
        layers: The parts of the model, from ``start`` on.
        linear_head: ``layers.head_is_linear()``, from ``start`` on.
        engine: LISA's engine, if the method has one.
    """

    decoder_name: str | None = None
    layers: Layers = field(init=False, repr=False)
    linear_head: bool = field(init=False, default=False)
    engine: LisaEngine | SliceEngine | None = field(init=False, default=None, repr=False)

    def prepare(self, model: Any) -> tuple[Any, Layers]:
        """The model and its parts, before its weights go to the device; the model may be wrapped here."""
        return model, find_layers(model, self.decoder_name)

    def usual_learning_rate(self, layers: Layers) -> float:
        """The peak learning rate for whoever gives none: the paper's for 7B models, which is transformers' too."""
        return 5e-5

    def start(self, layers: Layers, *, linear_head: bool) -> None:
        """Weights are where they stay now, and no optimizer is made yet. Nothing may be frozen here."""
        self.layers, self.linear_head = layers, linear_head

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer | None:
        """An optimizer of the method's own over ``groups``; None if any will do."""
        return None

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Change which parameters ``optimizer`` holds, if that has to be."""

    def begin_step(self, number: int, optimizer: torch.optim.Optimizer) -> bool:
        """Get ready for optimizer step ``number`` (from 0). Returns whether other parameters train from now on."""
        return False

    def gradients(self, learner: Learner, micro_batches: Iterable[Batch], num_labelled: int) -> tuple[Tensor, Tensor]:
        """Make the gradients of a step and clip them. Returns the loss, and their norm before clipping; scalars, float32."""
        loss = learner.backward(micro_batches, num_labelled)
        return loss, learner.clip()

    def observe(self, number: int, bad: bool) -> None:
        """Step ``number`` is made, or left out if it was ``bad``."""

    def finish(self, learner: Learner, folder: Path) -> Any:
        """Training is over: save what is the method's own in the run's ``folder``.

        Returns: The model to save; None if what was saved is all.
        """
        return learner.model

    def trained_parts(self) -> set[str]:
        """The parts that change in a step now."""
        return self._asking

    @cached_property
    def _asking(self) -> set[str]:
        return {
            part
            for part, parameters in self.layers.parts().items()
            if any(p.requires_grad for p in parameters.values())
        }

    def largest_draws(self, model: Any) -> list[tuple[int, ...]]:
        """For the forecast, before anything else is called: the draws of which one needs most memory in ``model``."""
        return [()]

    def draw_always(self, drawn: tuple[int, ...]) -> None:
        """For the forecast, before the first step: let ``drawn``, one of ``largest_draws``, train in each interval."""

    def states(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> dict[str, tuple[Tensor, State]]:
        """Optimizer state to save, by the names of ``parameters``, with the tensor that it belongs to."""
        return {name: (p, optimizer.state.get(p, {})) for name, p in parameters.items()}

    def place_state(
        self, name: str, parameters: Mapping[str, nn.Parameter], saved: State,
        place: Callable[[nn.Parameter, State], None],
    ) -> None:  # fmt: skip
        """Put what was saved as ``name`` back. ``place`` gives a parameter its state.

        Raises: KeyError if it belongs to none of ``parameters``.
        """
        place(parameters[name], saved)
