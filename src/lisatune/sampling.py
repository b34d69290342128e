"""Which decoder layers train in an interval.

A sampler is a pure function of its own fields and the interval number. Whoever holds equal fields draws equal layers:
a resumed run and every rank agree with nothing saved and nothing sent.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

from lisatune.errors import UserError


class Sampler(Protocol):
    """Anything that names the layers to train in an interval."""

    @property
    def num_layers(self) -> int:
        """How many decoder layers there are to draw from."""
        ...

    def __call__(self, interval: int) -> tuple[int, ...]:
        """The layers of interval number ``interval`` (from 0), distinct, ascending, each in ``range(num_layers)``."""
        ...


@dataclass(frozen=True)
class UniformSampler:
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

    num_layers: int
    num_active: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise UserError(f"num_layers is {self.num_layers}: a model needs at least 1 decoder layer")
        if not 0 <= self.num_active <= self.num_layers:
            raise UserError(
                f"num_active is {self.num_active}, but the model has {self.num_layers} decoder layers: "
                f"choose 0 to {self.num_layers}"
            )

    def __call__(self, interval: int) -> tuple[int, ...]:
        """The layers of interval number ``interval``, ascending; costs one hash a layer."""

        def rank(layer: int) -> bytes:
            return hashlib.blake2b(f"{self.seed}/{interval}/{layer}".encode(), digest_size=8).digest()

        return tuple(sorted(sorted(range(self.num_layers), key=rank)[: self.num_active]))
