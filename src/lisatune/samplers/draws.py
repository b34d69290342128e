"""What samplers are made of: numbers from hashes, draws by weight, and the chance that such a draw takes a layer.

A hash instead of a random generator keeps a draw the same in every version of Python and on every machine, and makes it
a function of what is hashed: nothing has to be saved or sent.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

from lisatune.errors import UserError

LOG_TIME_STEP = (
    0.125  # step of the integral in inclusion_by_weights: a step twice as long costs 3e-11 of a chance at 8 of 224
)


def hashed(seed: int, interval: int, layer: int) -> int:
    """64 bits that depend on seed, interval and layer alone.

    Example:
        >>> hashed(0, 7, 3) == hashed(0, 7, 3) != hashed(0, 8, 3), 0 <= hashed(0, 7, 3) < 2**64
        (True, True)
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}/{interval}/{layer}".encode(), digest_size=8).digest(), "big")


def check_counts(num_layers: int, num_active: int) -> None:
    """Refuse a model without layers, and more active layers than there are.

    Raises: UserError.
    """
    if num_layers < 1:
        raise UserError(f"num_layers is {num_layers}: a model needs at least 1 decoder layer")
    check_num_active(num_active, num_layers, least=0)


def check_num_active(num_active: int, num_units: int, *, unit: str = "decoder layers", least: int = 1) -> None:
    """Refuse to sample more than there are.

    Args:
        num_active: How many are sampled at a time.
        num_units: How many there are.
        unit: What is sampled, as people call it.
        least: The fewest that make sense.
    Raises: UserError.
    Example:
        >>> check_num_active(2, 2)
        >>> check_num_active(3, 2, unit="slices")
        Traceback (most recent call last):
        lisatune.errors.UserError: num_active is 3, but the model has 2 slices: choose 1 to 2
    """
    if not least <= num_active <= num_units:
        raise UserError(
            f"num_active is {num_active}, but the model has {num_units} {unit}: choose {least} to {num_units}"
        )


def draw_by_weights(weights: Sequence[float], num_drawn: int, hashes: Sequence[int]) -> tuple[int, ...]:
    """Draw ``num_drawn`` indices one after another, each time by weight among those that are left; ascending.

    Equals ``num_drawn`` rounds of "draw one in proportion to its weight, take it out". Each index has a clock that
    rings after an exponential time of rate ``weights[i]``, made from its hash, and the first to ring are drawn. Equal
    weights give the indices with the smallest hashes. A weight of 0 never rings.

    Cost: one logarithm an index, and a sort.
    Reference: Efraimidis and Spirakis, Weighted random sampling with a reservoir, 2006, whose keys u**(1/w) these are,
        but in logarithms, so that neither tiny nor huge weights lose their order.
    Example:
        >>> draw_by_weights([1.0, 0.0, 5.0, 1.0], 2, hashes=[2**60, 2**10, 2**62, 2**63])
        (0, 2)
    """
    clocks = [
        (_log_clock(h) - math.log(w), h, i) for i, (w, h) in enumerate(zip(weights, hashes, strict=True)) if w > 0
    ]
    return tuple(sorted(i for _, _, i in sorted(clocks)[:num_drawn]))


def _log_clock(bits: int) -> float:
    """log(-log(1 - u)) for u = (bits + 1/2) / 2**64, exact to rounding at both ends."""
    if bits < 2**63:
        return math.log(-math.log1p(-(2 * bits + 1) / 2**65))
    return math.log(-math.log((2**65 - 2 * bits - 1) / 2**65))


@lru_cache(maxsize=64)
def inclusion_by_weights(weights: tuple[float, ...], num_drawn: int) -> tuple[float, ...]:
    """The chance of each index to be among the ``num_drawn`` that ``draw_by_weights`` takes.

    With clocks of rate w, index i is drawn if it rings when fewer than ``num_drawn`` others have rung::

        p[i] = integral over t from 0 to infinity of  w[i] * exp(-w[i] * t) * P(fewer than num_drawn others rang by t)

    In s = log(t) the integrand is smooth and dies off at both ends, so the plain trapezoid rule converges faster than
    any power of its step. How many others rang is a sum of independent yes-or-noes, counted by adding up products of
    chances from both sides; nothing is subtracted, so small chances are as exact as large ones: to 1e-14 of themselves.

    Cost: about 400 points, more if weights differ by powers of ten, of len(weights) * num_drawn additions each: in
        Python 15 ms for 2 of 32, 0.2 s for 8 of 224; kept for weights that come again.
    Reference: Rosén, On sampling with probability proportional to size, 1997 (order sampling).
    Example:
        >>> [round(p, 4) for p in inclusion_by_weights((1.0, 1.0, 2.0), 1)]
        [0.25, 0.25, 0.5]
        >>> [round(p, 4) for p in inclusion_by_weights((1.0, 1.0, 2.0), 2)]  # 1/4 * 1/3 + 1/4 * 2/3 + 2/4 * 1/2 + ...
        [0.5833, 0.5833, 0.8333]
    """
    positive = [i for i, w in enumerate(weights) if w > 0]
    chances = [0.0] * len(weights)
    if num_drawn >= len(positive):
        for i in positive:
            chances[i] = 1.0
        return tuple(chances)
    if num_drawn == 0:
        return tuple(chances)
    logs = [math.log(weights[i]) for i in positive]
    top = max(logs)
    first = -top - math.log(len(logs)) - 40  # before it the integral has less than exp(-40) of each chance
    last = -min(logs) + math.log(50)  # after it all have rung, but for exp(-50)
    step = LOG_TIME_STEP * min(1.0, 6 / math.sqrt(num_drawn))  # the time of the last to be drawn is known the better
    totals = [0.0] * len(positive)
    for point in range(math.ceil((last - first) / step) + 1):
        s = first + point * step
        times = [math.exp(min(log + s, 700.0)) for log in logs]  # weight times time; exp(710) would overflow
        fewer = _fewer_others([-math.expm1(-t) for t in times], [math.exp(-t) for t in times], num_drawn)
        for j, t in enumerate(times):
            totals[j] += t * math.exp(-t) * fewer[j]
    for j, i in enumerate(positive):
        chances[i] = totals[j] * step
    return tuple(chances)


def _fewer_others(rang: Sequence[float], silent: Sequence[float], limit: int) -> list[float]:
    """For each index, the chance that fewer than ``limit`` of the others rang."""
    before = _counts(rang, silent, limit)
    after = _counts(rang[::-1], silent[::-1], limit)[::-1]
    fewer = []
    for j in range(len(rang)):
        total, cumulated = 0.0, 0.0
        for count in range(limit):  # exactly this many after j, and at most the rest of them before j
            cumulated += before[j][count]
            total += after[j + 1][limit - 1 - count] * cumulated
        fewer.append(total)
    return fewer


def _counts(rang: Sequence[float], silent: Sequence[float], limit: int) -> list[list[float]]:
    """For each prefix, the chance that 0, 1, ... ``limit`` - 1 of it rang."""
    rows = [[1.0] + [0.0] * (limit - 1)]
    for yes, no in zip(rang, silent, strict=True):
        last = rows[-1]
        rows.append([last[0] * no] + [last[c] * no + last[c - 1] * yes for c in range(1, limit)])
    return rows


@lru_cache(maxsize=4096)  # a sweep asks for the same order again, and with slices each matrix has one
def shuffled(num_layers: int, seed: int, interval: int) -> tuple[int, ...]:
    """All layers, in the order of their hashes."""
    return tuple(sorted(range(num_layers), key=lambda layer: hashed(seed, interval, layer)))
