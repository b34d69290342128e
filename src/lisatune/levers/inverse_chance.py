"""Updates divided by the chance to be made, so that in expectation every layer moves as if it were always active."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lisatune.errors import UserError
from lisatune.layers import Layers
from lisatune.levers.base import Lever
from lisatune.optim.adamw import AdamW

if TYPE_CHECKING:
    from lisatune.learner import Learner


@dataclass(kw_only=True)
class InverseChance(Lever):
    """Puts ``ChanceCorrection`` on, with the chances that the sampler tells at each switch."""

    correction: ChanceCorrection = field(init=False, repr=False)

    def put_on(self, learner: Learner) -> None:
        """Hook into the optimizer's step."""
        self.correction = ChanceCorrection(learner.optimizer)

    def after_switch(self, learner: Learner) -> None:
        """Take the chances of what was drawn."""
        engine = learner.engine
        if engine is None or engine.drawn is None:
            return
        chances = engine.sampler.inclusion(engine.interval)  # type: ignore[arg-type]
        self.correction.set(active_chances(learner.layers, engine.pool, engine.drawn, chances))


class ChanceCorrection:
    """Multiplies what an optimizer's step does to a parameter by 1 / (the chance that the parameter is active).

    LISA moves a decoder layer in gamma of N_L intervals as far as full fine-tuning would in each, so its expected step
    is gamma / N_L of the full one. With this its expected step is the full one::

        p = before + (after - before) / chance

    It is the update that is multiplied, weight decay included, and not the gradient: Adam divides by the gradient's
    size and would not notice. With SGD the two are the same, and there the expectation is exact. Of Adam's step it is
    the length that is made up for; its moments begin anew in each interval, as they do without.

    The price is length: at 2 of 32 layers an active one moves 16 times as far as it would, which is too far at a
    learning rate that was found without. Lower the rate by as much, and all that has changed under uniform sampling is
    that embedding, head and norm, whose chance is 1, move a sixteenth as far. More changes where layers differ in
    chance.

    Args:
        optimizer: Any that updates in ``step()``, not in the backward pass before.
    Cost: a copy of the active weights with a chance below 1 while the optimizer steps, and three passes over them. In
        bfloat16 rounding is multiplied too: a step that rounds to one unit in the last place becomes 16 of them, where
        a learning rate for each layer would round once.
    Raises: UserError by ``set`` for a chance that is not above 0, or above 1; by the optimizer's step if the updates
        were made in the backward pass.
    Reference: Horvitz and Thompson, 1952; GUM, arXiv:2510.17802, which divides so for GaLore and Muon.
    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.25)
        >>> correction = ChanceCorrection(optimizer)
        >>> correction.set({weight: 0.5})
        >>> weight.grad = torch.tensor([1.0, 2.0])
        >>> optimizer.step()
        >>> weight.tolist()  # 1 - 0.25 * gradient / 0.5
        [0.5, 0.0]
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.chances: dict[nn.Parameter, float] = {}
        self._before: dict[nn.Parameter, Tensor] = {}
        self._handles = [
            optimizer.register_step_pre_hook(self._keep),
            optimizer.register_step_post_hook(self._stretch),
        ]

    def set(self, chances: Mapping[nn.Parameter, float]) -> None:
        """Take ``chances`` from the next step on: of each active parameter; one that is left out has chance 1."""
        for chance in chances.values():
            if not 0 < chance <= 1:
                raise UserError(
                    f"an active parameter has the chance {chance}: give the chance with which it was sampled, above 0 and at most 1"
                )
        self.chances = {p: chance for p, chance in chances.items() if chance < 1}

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _keep(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        rows: Container[Tensor] = optimizer.row_gradients if isinstance(optimizer, AdamW) else ()
        if self.chances and not any(p.grad is not None or p in rows for p in self.chances):
            raise UserError(
                "no sampled parameter has a gradient when the optimizer steps: take no steps in the backward "
                "pass, or leave inverse_chance out"
            )
        self._before = {p: p.detach().clone() for p in self.chances}

    @torch.no_grad()
    def _stretch(self, *_: Any) -> None:
        for p, before in self._before.items():
            p.copy_(before.lerp_(p, 1 / self.chances[p]))
        self._before = {}


def active_chances(
    layers: Layers, pool: Sequence[str], drawn: Sequence[int], inclusion: Sequence[float]
) -> dict[nn.Parameter, float]:
    """The chances of the parameters that train now, for ``ChanceCorrection.set`` at each switch.

    Args:
        layers: The model's parts.
        pool: What the sampler draws from, as ``layers.pool`` gives it.
        drawn: What it drew: indices of the pool.
        inclusion: ``sampler.inclusion(interval)``.
    Returns: Parameter to chance, for those of the parts drawn.
    """
    parts = layers.parts()
    return {p: inclusion[index] for index in drawn for p in parts[pool[index]].values()}
