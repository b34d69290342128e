"""Each layer once in a sweep, in random order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lisatune.samplers.base import Sampler
from lisatune.samplers.draws import check_counts, shuffled


@dataclass(frozen=True)
class SweepSampler(Sampler):
    """Go through all layers in random order, each once, then again in another order.

    A sweep has ceil(num_layers / num_active) intervals. Each interval trains ``num_active`` layers, or one less where
    the layers do not divide evenly: 7 layers by 3 go as 2, 2, 3. So a sweep always begins with an interval, and memory
    is never above that of ``num_active`` layers. No layer waits for longer than two sweeps less two intervals.
    Independent draws have no such bound.

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

    for_slices: ClassVar[bool] = True
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
        return tuple(sorted(shuffled(self.num_layers, self.seed, sweep)[start:stop]))

    def inclusion(self, interval: int) -> tuple[float, ...]:
        """The share of intervals in the long run: one in each sweep."""
        return (1 / self.sweep_intervals if self.num_active else 0.0,) * self.num_layers
