"""Which decoder layers train in an interval.

A sampler is a pure function of its own fields and the interval number. Whoever holds equal fields draws equal layers:
a resumed run and every process agree with nothing saved and nothing sent. A sampler that learns also holds its scores,
which the checkpoint keeps. Then the same is true of fields and scores.

What is drawn is an index of ``layers.pool()``: most often a decoder layer, but a sampler asks only how many there are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lisatune.errors import UserError


class Sampler(ABC):
    """Names the layers to train in an interval. Inherit from it to write your own.

    For ``lisatune train`` the class is a dataclass. Its fields named ``num_layers``, ``num_active``, ``interval_steps``,
    ``seed`` and ``names`` (those of ``layers.pool()``) are filled in, as far as it has them. All other fields are its
    ``sampler_options``. ``num_layers`` is needed.

    Attributes:
        learns: It learns from the gradients of the layers that it drew: ``observe``, ``state_dict`` and
            ``load_state_dict`` do something. Drawing changes nothing. What is observed in an interval changes later
            draws, and never that interval's: a run that is stopped and resumed in mid-interval draws what it had drawn.
        whole: Each of several processes has to hold all weights whole.
        for_slices: It can draw slices: it has the field ``num_active``, and never draws more than that.
    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Top(Sampler):
        ...     num_layers: int
        ...     num_active: int
        ...     def __call__(self, interval):
        ...         return tuple(range(self.num_layers))[-self.num_active :]
        >>> Top(num_layers=6, num_active=2)(interval=0)
        (4, 5)
    """

    num_layers: int
    learns: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    for_slices: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, interval: int) -> tuple[int, ...]:
        """The layers of interval number ``interval`` (from 0), distinct, ascending, each in ``range(num_layers)``."""

    def inclusion(self, interval: int) -> tuple[float, ...]:
        """The chance of each layer to be active in ``interval``; their sum is the number of layers to expect.

        For a sampler that goes round by a plan it is the long-run share of intervals. ``inverse_chance`` divides updates
        by it, to make up for the intervals in which a layer is frozen.
        """
        raise UserError(
            f"{type(self).__name__} does not say how likely a layer is to be drawn: give it the method inclusion, or leave "
            "inverse_chance out"
        )

    def largest_draws(self, sizes: Sequence[int], num_decoder: int | None = None) -> list[tuple[int, ...]]:
        """Draws of which one needs the most memory; the planner takes the worst of them.

        By default they are the largest parts. Among equal ones those are the top layers, whose gradients exist while all
        activations do.

        Args:
            sizes: Parameters of each part.
            num_decoder: Given if the backward pass ends at the lowest part that is drawn: how many of the first parts are
                decoder layers. Then a draw with part 0, or of decoder layers alone, can need more.
        """
        return largest_of(getattr(self, "num_active", self.num_layers), sizes, num_decoder)

    def observe(self, step: int, scores: Mapping[int, float]) -> None:  # noqa: B027 - most samplers learn nothing
        """Take in, after optimizer step ``step``, the mean square of the gradient's elements of each active layer."""

    def state_dict(self) -> dict[str, Any]:
        """All that was learned, as JSON can hold it without loss."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Continue from what ``state_dict`` gave."""


def largest_of(num_active: int, sizes: Sequence[int], num_decoder: int | None = None) -> list[tuple[int, ...]]:
    """The draws of ``num_active`` parts that can need the most memory; see ``Sampler.largest_draws``.

    Example:
        >>> largest_of(2, [5, 5, 5, 9]), largest_of(2, [5, 5, 5, 9], num_decoder=3)
        ([(2, 3)], [(0, 3), (1, 2), (2, 3)])
    """
    by_size = sorted(range(len(sizes)), key=lambda i: (-sizes[i], -i))
    draws = {tuple(sorted(by_size[:num_active]))}
    if num_active and num_decoder is not None:
        draws |= {tuple(sorted({0, *by_size[: num_active - 1]})), tuple(range(num_decoder))[-num_active:]}
    return sorted(draws)
