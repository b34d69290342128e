"""Every set of layers equally likely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lisatune.samplers.base import Sampler
from lisatune.samplers.draws import check_counts, shuffled


@dataclass(frozen=True)
class UniformSampler(Sampler):
    """Draw ``num_active`` of ``num_layers`` layers, every set equally likely: the paper's gamma of N_L.

    Each layer gets a 64-bit hash of (seed, interval, layer) and those with the smallest hashes are drawn. A hash
    instead of a random generator keeps the draw the same in every version of Python and on every machine.

    Args:
        num_layers: Decoder layers of the model (N_L), at least 1.
        num_active: Layers drawn for each interval (gamma), 0 to ``num_layers``.
        seed: Any integer; another seed gives other draws.
    Raises: UserError if ``num_active`` lies outside 0 to ``num_layers``.
    Reference: Pan et al., LISA, arXiv:2403.17919, Algorithm 1.
    Example:
        >>> UniformSampler(num_layers=32, num_active=2, seed=0)(interval=7)
        (3, 13)
    """

    for_slices: ClassVar[bool] = True
    num_layers: int
    num_active: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self.num_layers, self.num_active)

    def __call__(self, interval: int) -> tuple[int, ...]:
        """The layers of interval number ``interval``, ascending; costs one hash a layer."""
        return tuple(sorted(shuffled(self.num_layers, self.seed, interval)[: self.num_active]))

    def inclusion(self, interval: int) -> tuple[float, ...]:
        """num_active / num_layers for each layer."""
        return (self.num_active / self.num_layers,) * self.num_layers
