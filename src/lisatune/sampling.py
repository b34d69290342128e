"""Which decoder layers train in an interval.

A sampler is a pure function of its own fields and the interval number. Whoever holds equal fields draws equal layers:
a resumed run and every rank agree with nothing saved and nothing sent. A sampler that learns holds its scores besides,
which the checkpoint keeps; then the same is true of fields and scores.

What is drawn is an index of ``layers.pool()``: most often a decoder layer, but a sampler asks only how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from lisatune.draws import check_counts, hashed
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


class SamplerWithChances(Sampler, Protocol):
    """A sampler that also tells how likely each layer is to train; all of this package do."""

    def inclusion(self, interval: int) -> tuple[float, ...]:
        """The chance of each layer to be active in ``interval``; their sum is the number of layers to expect.

        Of samplers that go round by a plan it is the long-run share of intervals. What an update would be divided by
        to make up for the intervals in which the layer is frozen.
        """
        ...


class LearningSampler(SamplerWithChances, Protocol):
    """A sampler that learns from the gradients of the layers it drew.

    To draw changes nothing. What is observed in an interval changes later draws, and never that interval's: a run that
    is stopped in mid-interval and resumed with the saved state draws what it had drawn.
    """

    def observe(self, step: int, scores: Mapping[int, float]) -> None:
        """Take in, after optimizer step ``step``, the mean square of the gradient's elements of each active layer."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that was learnt, as JSON can hold it without loss."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
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
        check_counts(self.num_layers, self.num_active)

    def __call__(self, interval: int) -> tuple[int, ...]:
        """The layers of interval number ``interval``, ascending; costs one hash a layer."""
        return tuple(sorted(_shuffled(self.num_layers, self.seed, interval)[: self.num_active]))

    def inclusion(self, interval: int) -> tuple[float, ...]:
        """num_active / num_layers for each layer."""
        return (self.num_active / self.num_layers,) * self.num_layers


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


@dataclass(frozen=True)
class SweepSampler:
    """Go through all layers in random order, each once, then again in another order.

    A sweep takes ``num_active`` layers an interval, and so ceil(num_layers / num_active) intervals. If the layers do
    not go into the intervals evenly, some intervals have one layer less: 7 layers by 3 go as 2, 2, 3. To fill these up
    from the next sweep would hold the number of layers, but then a sweep would end within an interval and the next
    would have to avoid its layers, and theirs theirs; this way a sweep begins with an interval, and memory is never
    above that of ``num_active`` layers. Against independent draws, no layer waits for longer than two sweeps less two
    intervals.

    Args:
        num_layers: Decoder layers of the model (N_L), at least 1.
        num_active: The most layers drawn for an interval (gamma), 0 to ``num_layers``.
        seed: Any integer; another seed gives other orders.
    Raises: UserError if ``num_active`` lies outside 0 to ``num_layers``.
    Reference: Luo et al., BAdam, arXiv:2404.02827, whose blocks go by random reshuffling.
    Example:
        >>> sampler = SweepSampler(num_layers=7, num_active=3, seed=0)
        >>> [sampler(interval) for interval in range(3)]
        [(0, 4), (2, 3), (1, 5, 6)]
    """

    num_layers: int
    num_active: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self.num_layers, self.num_active)

    @property
    def sweep_intervals(self) -> int:
        """Intervals of a sweep."""
        return -(-self.num_layers // max(1, self.num_active))

    def __call__(self, interval: int) -> tuple[int, ...]:
        """The layers of interval number ``interval``, ascending; costs one hash a layer."""
        if self.num_active == 0:
            return ()
        sweep, group = divmod(interval, self.sweep_intervals)
        start, stop = (self.num_layers * g // self.sweep_intervals for g in (group, group + 1))
        return tuple(sorted(_shuffled(self.num_layers, self.seed, sweep)[start:stop]))

    def inclusion(self, interval: int) -> tuple[float, ...]:
        """The long-run share: one interval in each sweep."""
        return (1 / self.sweep_intervals if self.num_active else 0.0,) * self.num_layers


@dataclass(frozen=True)
class RoundRobinSampler:
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


@dataclass(frozen=True)
class FixedSampler:
    """The same layers in every interval; the others never train.

    Args:
        num_layers: Decoder layers of the model (N_L), at least 1.
        layers: Those that train, distinct, in any order.
    Raises: UserError for a layer that there is not, or that is named twice.
    Reference: The paper's LISA-fix, arXiv:2403.17919v4, with layers drawn once; its ablation's K = T.
    Example:
        >>> FixedSampler(num_layers=32, layers=(31, 30))(interval=7)
        (30, 31)
    """

    num_layers: int
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        check_counts(self.num_layers, 0)
        for layer in self.layers:
            if layer not in range(self.num_layers):
                raise UserError(f"there is no layer {layer} to train: choose 0 to {self.num_layers - 1}")
            if self.layers.count(layer) > 1:
                raise UserError(f"layer {layer} is named twice: name each layer to train once")

    def __call__(self, interval: int) -> tuple[int, ...]:
        """The layers, ascending."""
        return tuple(sorted(self.layers))

    def inclusion(self, interval: int) -> tuple[float, ...]:
        """1 for the layers that train, 0 for the others."""
        return tuple(1.0 if layer in self.layers else 0.0 for layer in range(self.num_layers))


@lru_cache(maxsize=4096)  # a sweep asks for the same order again, and with slices each matrix has one
def _shuffled(num_layers: int, seed: int, interval: int) -> tuple[int, ...]:
    """All layers, in the order of their hashes."""
    return tuple(sorted(range(num_layers), key=lambda layer: hashed(seed, interval, layer)))
