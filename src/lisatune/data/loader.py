"""Encoded documents to the batches of optimizer steps, in an order that depends on the seed and the epoch alone.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lisatune.data.mixture import Mixture
from lisatune.data.packing import pack
from lisatune.data.tokenize import IGNORED, Encoded
from lisatune.errors import UserError

Packer = Callable[[Sequence[int], int], list[list[int]]]
WINDOW = 1000  # documents packed, or shuffled in a stream, at a time
GROUPED_BATCHES = 50  # batches among whose rows those of like length are found


class Position(NamedTuple):
    """Where a reader of the data stands: in the window that begins at item ``first``, ``rows`` rows are done."""

    epoch: int = 0
    first: int = 0
    rows: int = 0


class Stream(Protocol):
    """Documents that cannot all be held."""

    def windows(self, first: int) -> Iterator[tuple[int, list[Encoded]]]:
        """Windows of documents with the number of their first item, from that on which begins at item ``first``."""
        ...


@dataclass(frozen=True)
class Batch:
    """The rows of one optimizer step; all (B, T), ids, labels and positions int64, weights float32.

    ``labels`` are shifted already: ``labels[b, t]`` is the token to predict at ``t``, or -100. ``position_ids`` begin
    anew with each document, which is how the attention knows to keep documents apart. ``is_token`` is False on padding.
    ``places`` says where the documents come from, ``sources`` how many tokens of which data set.
    ``weights[b, t]`` is what the loss of ``labels[b, t]`` counts; None: 1 each.
    ``labelled``, on a device, are the places of labelled tokens in the flat labels, int64: the device is not asked for them.
    ``micro_batches`` are ready for the device, if they were made beside the step before. ``computed`` then counts their
    places on all processes, and ``padding`` those among them that hold no token.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    is_token: Tensor
    places: tuple[str, ...] = ()
    weights: Tensor | None = None
    sources: tuple[tuple[int, int], ...] = ()
    labelled: Tensor | None = None
    micro_batches: tuple[Batch, ...] = ()
    computed: int = 0
    padding: int = 0

    @property
    def num_labelled(self) -> int:
        """Tokens that are learned: the divisor of the step's loss."""
        return int((self.labels != IGNORED).sum())

    @property
    def num_tokens(self) -> int:
        """Tokens of documents, padding not counted."""
        return int(self.is_token.sum())

    def share(self, rank: int, num_ranks: int) -> Batch:
        """What process ``rank`` of ``num_ranks`` computes: every ``num_ranks``-th row.

        All shares have equally many rows, so that all processes take equally many passes: where there is none left, one of
        padding is added, with nothing to learn.
        """
        missing = -len(self.input_ids) % num_ranks

        def take(t: Tensor, filling: int) -> Tensor:
            return torch.nn.functional.pad(t, (0, 0, 0, missing), value=filling)[rank::num_ranks]

        positions = self.position_ids
        if missing:
            positions = torch.cat([positions, torch.arange(positions.shape[1]).repeat(missing, 1)])
        ids, labels, is_token = take(self.input_ids, 0), take(self.labels, IGNORED), take(self.is_token, False)
        weights = None if self.weights is None else take(self.weights, 1)
        return Batch(ids, labels, positions[rank::num_ranks], is_token, self.places, weights, self.sources)

    def split(self, num_rows: int, *, all_tokens: bool = False) -> Iterator[Batch]:
        """Micro-batches of at most ``num_rows`` rows, without the columns that only other rows need.

        ``all_tokens`` keeps what stands after the last label: a mixture's routers are balanced over it too.
        """
        for start in range(0, len(self.input_ids), num_rows):
            rows = slice(start, start + num_rows)
            needed = self.is_token[rows] if all_tokens else self.labels[rows] != IGNORED
            used = needed.any(0).nonzero()
            width = int(used[-1]) + 1 if len(used) else 1
            yield self._map(lambda t: t[rows, :width])  # noqa: B023 - called at once

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``. From pinned memory nobody waits for the copy."""
        places = (self.labels.flatten() != IGNORED).nonzero().squeeze(1) if self.labelled is None else self.labelled
        waits_not = device.type == "cuda"
        moved = self._map(lambda t: t.to(device, non_blocking=waits_not))
        return replace(moved, labelled=places.to(device, non_blocking=waits_not))

    def pinned(self) -> Batch:
        """The same in pinned memory, from which a GPU copies by itself; ``labelled`` is there."""
        ready = self._map(lambda t: t.contiguous().pin_memory())
        return replace(ready, labelled=(self.labels.flatten() != IGNORED).nonzero().squeeze(1).pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        ids, labels, positions = change(self.input_ids), change(self.labels), change(self.position_ids)
        weights = None if self.weights is None else change(self.weights)
        return Batch(ids, labels, positions, change(self.is_token), self.places, weights, self.sources)


def collate(rows: Sequence[Sequence[Encoded]], pad_id: int) -> Batch:
    """Lay rows of documents side by side, padded on the right to the longest.

    Padding needs no mask: attention is causal, and what stands after the last label is never used.
    """
    width = max(sum(len(document) for document in row) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), IGNORED)
    positions = torch.arange(width).repeat(len(rows), 1)
    is_token = torch.zeros(len(rows), width, dtype=torch.bool)
    weights = None
    if any(document.weights is not None for row in rows for document in row):
        weights = torch.ones(len(rows), width)
    for b, row in enumerate(rows):
        start = 0
        for document in row:
            end = start + len(document)
            ids[b, start:end] = torch.tensor(document.ids)
            # shifted: position t predicts the token at t + 1, never the first token of the next document
            is_token[b, start:end] = True
            labels[b, start : end - 1] = torch.tensor(document.labels[1:], dtype=torch.int64)
            if weights is not None and document.weights is not None:
                weights[b, start : end - 1] = torch.tensor(document.weights[1:])
            if len(row) > 1:
                positions[b, end:] = torch.arange(width - end)  # the next document begins at 0 again
            start = end
    documents = [document for row in rows for document in row]
    sources = tuple((document.source, len(document)) for document in documents)
    return Batch(ids, labels, positions, is_token, tuple(document.where for document in documents), weights, sources)


class Loader:
    """Batches of optimizer steps, epoch after epoch without end, from any position on.

    Args:
        documents: A sequence or a ``Mixture``, shuffled anew each epoch, or a ``Stream``, shuffled within its windows.
        rows_per_step: Rows of a batch; the last one of an epoch may have fewer.
        max_length: Tokens of a row.
        pad_id: Token that fills rows up.
        packing: Fill rows with several documents.
        seed: Seed of the order.
        shuffle: False keeps the order given.
        group_by_length: Give a batch rows of like length, as ``grouped`` does. Not with packing or a stream.
        pack: Packs documents into rows.
    Raises: UserError if there is no document.
    """

    def __init__(
        self,
        documents: Sequence[Encoded] | Mixture | Stream,
        *,
        rows_per_step: int,
        max_length: int,
        pad_id: int,
        packing: bool = False,
        seed: int = 0,
        shuffle: bool = True,
        group_by_length: bool = False,
        pack: Packer = pack,
    ) -> None:
        self.documents = documents
        self.rows_per_step = rows_per_step
        self.max_length = max_length
        self.pad_id = pad_id
        self.packing = packing
        self.seed = seed
        self.shuffle = shuffle
        self.group_by_length = group_by_length
        self.pack = pack
        self.window = GROUPED_BATCHES * rows_per_step if group_by_length else WINDOW

    def batches(self, start: Position = Position()) -> Iterator[tuple[Batch, Position]]:  # noqa: B008 - a constant
        """Batches from ``start`` on, each with the position after it, which is where to go on.

        A pure function of the documents, the seed and ``start``: going on from a position gives what would have
        followed. What lies before it is skipped; of a stream it is read again, but not tokenized.

        Raises: UserError if an epoch is empty.
        """
        while True:
            empty = start == (start.epoch, 0, 0)
            for batch, position in self._epoch(start):
                empty = False
                yield batch, position
            if empty:
                raise UserError("the data holds no token to learn: give rows with answers, or raise max_length")
            start = Position(start.epoch + 1)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch."""
        return (batch for batch, _ in self._epoch(Position(epoch)))

    def num_steps(self) -> int:
        """Batches in the first epoch; counted without making them. Packing may give another epoch one more or less."""
        if isinstance(self.documents, Sequence) and not self.packing:
            return -(-len(self.documents) // self.rows_per_step)
        if isinstance(self.documents, Mixture) and not self.packing:
            return -(-sum(self.documents.counts()) // self.rows_per_step)
        return -(-sum(1 for _ in self._rows(Position())) // self.rows_per_step)

    def _epoch(self, start: Position) -> Iterator[tuple[Batch, Position]]:
        rows: list[list[Encoded]] = []
        for row, position in self._rows(start):
            rows.append(row)
            if len(rows) == self.rows_per_step:
                yield collate(rows, self.pad_id), position
                rows = []
        if rows:
            yield collate(rows, self.pad_id), Position(start.epoch + 1)

    def _rows(self, start: Position) -> Iterator[tuple[list[Encoded], Position]]:
        """The rest of an epoch, a row at a time, each with the position after it."""
        for first, window in self._windows(start):
            order = random.Random(f"{self.seed}/{start.epoch}/{first}")
            if self.shuffle and not isinstance(self.documents, Sequence | Mixture):
                order.shuffle(window)
            rows = [[document] for document in window]
            if self.packing:
                rows = [[window[i] for i in row] for row in self.pack([len(d) for d in window], self.max_length)]
                if self.shuffle:
                    order.shuffle(rows)  # longest first would order the steps by length
            elif self.group_by_length:
                rows = grouped(rows, self.rows_per_step, order)
            done = start.rows if first == start.first else 0
            for number, row in enumerate(rows[done:], start=done + 1):
                yield row, Position(start.epoch, first, number)

    def _windows(self, start: Position) -> Iterator[tuple[int, list[Encoded]]]:
        documents = self.documents
        if not isinstance(documents, Sequence | Mixture):
            yield from documents.windows(start.first)
            return
        is_mixture = isinstance(documents, Mixture)
        order: Sequence[Any] = documents.of_epoch(start.epoch) if is_mixture else range(len(documents))  # type: ignore[arg-type, union-attr]
        if self.shuffle:  # places are shuffled, not documents, which need not be in memory
            order = random.Random(f"{self.seed}/{start.epoch}").sample(order, len(order))
        for first in range(start.first, len(order), self.window):
            yield first, [documents[place] for place in order[first : first + self.window]]


def grouped(rows: list[list[Encoded]], rows_per_step: int, order: random.Random) -> list[list[Encoded]]:
    """``rows`` of one document each, so that batches have rows of like length, in an order made by ``order``.

    Example:
        >>> rows = [[Encoded([0] * length, [0] * length)] for length in (5, 1, 4, 2, 3)]
        >>> [len(document) for (document,) in grouped(rows, 2, random.Random(1))]
        [3, 2, 5, 4, 1]
    """
    rows = sorted(rows, key=lambda row: len(row[0]), reverse=True)
    whole = len(rows) // rows_per_step
    batches = [rows[number * rows_per_step : (number + 1) * rows_per_step] for number in range(whole)]
    order.shuffle(batches)
    return [row for batch in batches for row in batch] + rows[whole * rows_per_step :]  # what fills no batch comes last
