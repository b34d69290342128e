"""Several data sets as one, each with its share of the rows that are drawn."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lisatune.data.tokenize import Encoded

Item = TypeVar("Item")


@dataclass(frozen=True)
class Mixture:
    """Documents of several data sets in the shares asked for, a pure function of the seed and the epoch.

    An epoch is as long as it can be without a document twice. The documents of a larger set take turns: an epoch goes on
    where the last one ended, in an order that the seed gives, and begins again at its end.

    Args:
        parts: The documents of each data set.
        shares: The share of each; what they add up to does not matter.
        seed: Seed of the order in which documents take turns.
        shuffle: False keeps the order of each data set; they take turns by their shares.
    Example:
        >>> Mixture([[1] * 30, [2] * 30], [2, 1]).counts()
        [30, 15]
    """

    parts: Sequence[Sequence[Encoded]]
    shares: Sequence[float]
    seed: int = 0
    shuffle: bool = True

    def counts(self) -> list[int]:
        """Documents of each data set in an epoch; at least one of each."""
        total = min(len(part) / share for part, share in zip(self.parts, self.shares, strict=True))
        return [
            max(1, min(len(part), round(total * share))) for part, share in zip(self.parts, self.shares, strict=True)
        ]

    def of_epoch(self, epoch: int) -> list[tuple[int, int]]:
        """The (data set, document) pairs of an epoch: one data set after the other, or in turns if nothing is shuffled."""
        chosen, counts = [], self.counts()
        for number, (part, count) in enumerate(zip(self.parts, counts, strict=True)):
            order: Sequence[int] = range(len(part))
            if self.shuffle:
                order = random.Random(f"{self.seed}/{number}").sample(order, len(order))
            begin = epoch * count
            chosen.append([(number, order[position % len(part)]) for position in range(begin, begin + count)])
        if self.shuffle:
            return [place for places in chosen for place in places]
        return [place for _, place in interleaved(chosen, counts)]

    def __getitem__(self, place: tuple[int, int]) -> Encoded:
        part, document = place
        return self.parts[part][document]


def interleaved(parts: Sequence[Iterable[Item]], shares: Sequence[float]) -> Iterator[tuple[int, Item]]:
    """Items of several streams with the number of theirs, each next one from that which is furthest behind its share.

    Ends with the first stream that ends.

    Example:
        >>> [number for number, _ in interleaved(["aaaaaa", "bbb"], [2, 1])]
        [0, 1, 0, 0, 1, 0, 0, 1, 0]
    """
    streams, drawn, total = [iter(part) for part in parts], [0] * len(parts), sum(shares)
    while True:
        step = sum(drawn) + 1
        number = max(range(len(streams)), key=lambda i: (shares[i] / total * step - drawn[i], -i))
        try:
            item = next(streams[number])
        except StopIteration:
            return
        drawn[number] += 1
        yield number, item
