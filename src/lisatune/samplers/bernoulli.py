"""Each layer drawn by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from lisatune.errors import UserError
from lisatune.samplers.base import Sampler, largest_of
from lisatune.samplers.draws import check_counts, hashed


@dataclass(frozen=True)
class BernoulliSampler(Sampler):
    """Draw each layer by itself with its own chance, as the pseudo code of the paper's first version does.

    How many are active varies: with chance 2/32 each, 2 on average, none in 13% of intervals and 5 or more in 5%. So
    does the memory; the later versions draw exactly gamma instead.

    Args:
        num_layers: Decoder layers of the model (N_L), at least 1.
        probabilities: The chance of every layer, or one for each (p of the paper), each from 0 to 1. By default
            ``num_active / num_layers`` for each.
        seed: Any integer; another seed gives other draws.
        num_active: The number of layers to expect (gamma), used only if there are no ``probabilities``.
    Raises: UserError for another number of chances than layers, and for what is no chance.
    Reference: Pan et al., LISA, arXiv:2403.17919v1, Algorithm 1.
    Example:
        >>> [BernoulliSampler(num_layers=8, probabilities=0.25, seed=0)(interval) for interval in range(3)]
        [(0, 2, 4), (2, 3, 7), ()]
    """

    num_layers: int
    probabilities: float | Sequence[float] | None = None
    seed: int = 0
    num_active: int = field(default=0, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_counts(self.num_layers, self.num_active)
        given = self.num_active / self.num_layers if self.probabilities is None else self.probabilities
        chances = (given,) * self.num_layers if isinstance(given, int | float) else tuple(given)
        object.__setattr__(self, "probabilities", chances)
        if len(chances) != self.num_layers:
            raise UserError(f"{len(chances)} probabilities were given for {self.num_layers} layers: give one for each")
        for layer, chance in enumerate(chances):
            if not 0 <= chance <= 1:
                raise UserError(f"the probability of layer {layer} is {chance}: choose 0 to 1")

    def __call__(self, interval: int) -> tuple[int, ...]:
        """The layers of interval number ``interval``, ascending, perhaps none; costs one hash a layer."""
        return tuple(
            layer
            for layer, chance in enumerate(self.inclusion(interval))
            if hashed(self.seed, interval, layer) < chance * 2**64  # Python compares the two exactly
        )

    def inclusion(self, interval: int) -> tuple[float, ...]:
        """The chances themselves."""
        return cast(tuple[float, ...], self.probabilities)

    def largest_draws(self, sizes: Sequence[int], num_decoder: int | None = None) -> list[tuple[int, ...]]:
        """Those of as many parts as 99 of 100 draws do not exceed."""
        chances = self.inclusion(0)
        mean, variance = sum(chances), sum(p * (1 - p) for p in chances)
        return largest_of(min(len(sizes), math.ceil(mean + 2.33 * math.sqrt(variance))), sizes, num_decoder)
