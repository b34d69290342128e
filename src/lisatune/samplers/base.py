"""Which decoder layers train in an interval.

A sampler is a pure function of its own fields and the interval number. Whoever holds equal fields draws equal layers:
a resumed run and every rank agree with nothing saved and nothing sent. A sampler that learns holds its scores besides,
which the checkpoint keeps; then the same is true of fields and scores.

What is drawn is an index of ``layers.pool()``: most often a decoder layer, but a sampler asks only how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


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
