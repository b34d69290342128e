"""Each layer drawn by itself."""

from __future__ import annotations

from dataclasses import dataclass

from lisatune.errors import UserError
from lisatune.samplers.draws import check_counts, hashed


@dataclass(frozen=True)
class BernoulliSampler:
    """Draw each layer by itself with its own chance, as the pseudo code of the paper's first version does.

    How many are active varies: with chance 2/32 each, 2 on average, none in 13% of intervals and 5 or more in 5%. So
    does the memory; the later versions draw exactly gamma instead.

    Args:
        num_layers: Decoder layers of the model (N_L), at least 1.
        probability: The chance of every layer, or a tuple with one for each (p of the paper), each from 0 to 1.
        seed: Any integer; another seed gives other draws.
    Raises: UserError for another number of chances than layers, and for what is no chance.
    Reference: Pan et al., LISA, arXiv:2403.17919v1, Algorithm 1.
    Example:
        >>> [BernoulliSampler(num_layers=8, probability=0.25, seed=0)(interval) for interval in range(3)]
        [(0, 2, 4), (2, 3, 7), ()]
    """

    num_layers: int
    probability: float | tuple[float, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self.num_layers, 0)
        chances = self.inclusion(0)
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
        return self.probability if isinstance(self.probability, tuple) else (self.probability,) * self.num_layers
