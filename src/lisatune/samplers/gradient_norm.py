"""Layers drawn by what their gradients were so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lisatune.errors import UserError
from lisatune.samplers.base import Sampler
from lisatune.samplers.draws import check_counts, draw_by_weights, hashed, inclusion_by_weights


@dataclass(eq=False)
class GradientNormSampler(Sampler):
    """Draw the layers whose gradients are large more often.

    The score of a layer is the mean over an interval's steps of its gradient's root mean square, so that layers of any
    size compare, and is smoothed over the intervals in which the layer was active. Layers are drawn as
    ``WeightedSampler`` draws, by::

        weights = (1 - exploration) * softmax(scores / mean(scores) / temperature) + exploration / num_layers

    A layer that was never active is drawn before all others. So, if scores count at once (``refresh_intervals=1``), the
    first ceil(num_layers / num_active) intervals go through all layers in random order. The reference begins with steps
    of full gradients without updates instead, which takes the memory that LISA is there to save. A frozen layer keeps
    its score: without ``exploration`` one that scored low by chance could wait for long.

    The reference divides scores by nothing, so its temperature goes with the size of gradients, and with the loss, the
    model and the number type; divided by their mean, 1.0 means the same everywhere: a layer of twice the mean score is
    drawn e times as readily as one of the mean.

    Interval numbers are told from steps: scores of interval i change the draws of later intervals only, and no earlier
    interval can be asked for again once a later one was observed.

    Args:
        num_layers: Decoder layers of the model (N_L), at least 1.
        num_active: Layers drawn for each interval (gamma), 0 to ``num_layers``.
        interval_steps: The same as the engine's (K).
        seed: Any integer; another seed gives other draws.
        temperature: Above 0; high draws evenly, low draws the highest scores.
        exploration: The share of even draws, 0 to 1.
        smoothing: The share of the newest interval in a score, above 0 to 1.
        refresh_intervals: New scores count from each multiple of so many intervals on (T_u of the reference, in K).
    Raises: UserError for an argument outside these bounds.
    Cost: a hash and two exponentials a layer for a draw; three numbers of state a layer.
    Reference: Tian et al., GRASS, arXiv:2604.07808. MISA, arXiv:2511.00056, is near: it has the softmax over squares.
    Example:
        >>> sampler = GradientNormSampler(num_layers=3, num_active=1, interval_steps=1, seed=0, temperature=0.2)
        >>> gradients = [1e-8, 1e-8, 9e-8]
        >>> draws = []
        >>> for step in range(9):
        ...     (layer,) = sampler(interval=step)
        ...     sampler.observe(step, {layer: gradients[layer]})
        ...     draws.append(layer)
        >>> draws
        [0, 2, 1, 2, 2, 2, 2, 2, 2]
    """

    num_layers: int
    num_active: int
    interval_steps: int
    seed: int = 0
    temperature: float = field(default=1.0, kw_only=True)
    exploration: float = field(default=0.1, kw_only=True)
    smoothing: float = field(default=0.5, kw_only=True)
    refresh_intervals: int = field(default=1, kw_only=True)
    learns: ClassVar[bool] = True
    whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_counts(self.num_layers, self.num_active)
        for name in ("interval_steps", "refresh_intervals"):
            if (count := getattr(self, name)) < 1:
                raise UserError(f"{name} is {count}: choose at least 1")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}: choose a number above 0")
        if not 0 <= self.exploration <= 1:
            raise UserError(f"exploration is {self.exploration}: choose 0 to 1")
        if not 0 < self.smoothing <= 1:
            raise UserError(f"smoothing is {self.smoothing}: choose a number above 0, at most 1")
        self._scores: list[float | None] = [None] * self.num_layers  # from before the current period
        self._sums = [0.0] * self.num_layers  # sums of the current period
        self._counts = [0] * self.num_layers
        self._period = 0  # the one that was last observed; a period is refresh_intervals intervals

    def __call__(self, interval: int) -> tuple[int, ...]:
        """The layers of interval number ``interval``, ascending, by what is known now; changes nothing."""
        hashes = [hashed(self.seed, interval, layer) for layer in range(self.num_layers)]
        unseen, weights = self._weights(interval)
        first = sorted(unseen, key=hashes.__getitem__)[: self.num_active]
        return tuple(sorted((*first, *draw_by_weights(weights, self.num_active - len(first), hashes))))

    def inclusion(self, interval: int) -> tuple[float, ...]:
        """The chance of each layer to be drawn, given what is known now."""
        unseen, weights = self._weights(interval)
        num_first = min(len(unseen), self.num_active)
        chances = list(inclusion_by_weights(tuple(weights), self.num_active - num_first))
        for layer in unseen:
            chances[layer] = num_first / len(unseen)
        return tuple(chances)

    def observe(self, step: int, scores: Mapping[int, float]) -> None:
        """Take in the gradients of optimizer step ``step`` (from 0).

        Args:
            step: Number of the step; steps may be left out, but not go back to an earlier period.
            scores: Layer to the mean square of its gradient's elements, for the layers that are active; before
                clipping, which scales by the whole model's norm.
        Raises: UserError for a step from an earlier period, for a layer that there is not, and for a score that is
            negative or not finite.
        """
        period = step // self.interval_steps // self.refresh_intervals
        if period < self._period:
            raise UserError(
                f"step {step} was observed after steps of a later interval: load the sampler's state of that step first"
            )
        for layer, score in scores.items():
            if layer not in range(self.num_layers):
                raise UserError(f"there is no layer {layer} to observe: the sampler draws from {self.num_layers}")
            if not 0 <= score < math.inf:
                raise UserError(f"the squared gradient of layer {layer} is {score} at step {step}")
        if period > self._period:
            self._scores = self._known(period)
            self._sums, self._counts = [0.0] * self.num_layers, [0] * self.num_layers
            self._period = period
        for layer, score in scores.items():
            self._sums[layer] += math.sqrt(score)
            self._counts[layer] += 1

    def state_dict(self) -> dict[str, Any]:
        """All that was learned: lists of numbers, which JSON holds without loss."""
        return {
            "scores": list(self._scores),
            "sums": list(self._sums),
            "counts": list(self._counts),
            "period": self._period,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, as ``state_dict`` gave it.

        Raises: UserError if it is of another number of layers.
        """
        if len(state["scores"]) != self.num_layers:
            raise UserError(
                f"the saved scores are of {len(state['scores'])} layers, but the sampler draws from {self.num_layers}"
            )
        self._scores = list(state["scores"])
        self._sums, self._counts = list(state["sums"]), list(state["counts"])
        self._period = state["period"]

    def _known(self, period: int) -> list[float | None]:
        """The scores that count in ``period``: what was observed in the last one does only if that one is over."""
        if period <= self._period:
            return list(self._scores)
        known: list[float | None] = []
        for old, total, count in zip(self._scores, self._sums, self._counts, strict=True):
            if count == 0:
                known.append(old)
            else:
                new = total / count
                known.append(new if old is None else self.smoothing * new + (1 - self.smoothing) * old)
        return known

    def _weights(self, interval: int) -> tuple[list[int], list[float]]:
        """The layers never seen, and the weight of each of the others (0 for those never seen)."""
        known = self._known(interval // self.refresh_intervals)
        unseen = [layer for layer, score in enumerate(known) if score is None]
        seen = [score for score in known if score is not None]
        mean = sum(seen) / len(seen) if any(seen) else 1.0
        powers = [score / mean / self.temperature for score in seen]
        top = max(powers, default=0.0)
        # a share of exp(-700) is as good as none, but never 0: so many layers as are to be drawn can be drawn
        shares = [math.exp(max(power - top, -700.0)) for power in powers]
        total = sum(shares)
        weights = iter((1 - self.exploration) * share / total + self.exploration / len(seen) for share in shares)
        return unseen, [0.0 if score is None else next(weights) for score in known]
