"""Layers in turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lisatune.samplers.base import Sampler
from lisatune.samplers.draws import check_counts


@dataclass(frozen=True)
class RoundRobinSampler(Sampler):
    """Go through the layers in order, from the bottom, and start again after the last.

    Args:
        num_layers: Decoder layers of the model (N_L), at least 1.
        num_active: Layers of each interval (gamma), 0 to ``num_layers``; an interval may hold the last and the first.
        descending: Go from the top down. Then, with a frozen embedding, each interval differentiates deeper than the
            one before.
    Raises: UserError if ``num_active`` lies outside 0 to ``num_layers``.
    Reference: Luo et al., BAdam, arXiv:2404.02827, its ascending and descending orders; Liu et al., HiFT,
        arXiv:2401.15207.
    Example:
        >>> [RoundRobinSampler(num_layers=5, num_active=2)(interval) for interval in range(4)]
        [(0, 1), (2, 3), (0, 4), (1, 2)]
    """

    for_slices: ClassVar[bool] = True
    num_layers: int
    num_active: int
    descending: bool = False

    def __post_init__(self) -> None:
        check_counts(self.num_layers, self.num_active)

    def __call__(self, interval: int) -> tuple[int, ...]:
        """The layers of interval number ``interval``, ascending."""
        first = interval * self.num_active
        turns = [turn % self.num_layers for turn in range(first, first + self.num_active)]
        return tuple(sorted(self.num_layers - 1 - turn if self.descending else turn for turn in turns))

    def inclusion(self, interval: int) -> tuple[float, ...]:
        """The long-run share: num_active / num_layers for each layer."""
        return (self.num_active / self.num_layers,) * self.num_layers
