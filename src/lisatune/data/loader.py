"""Encoded documents to the batches of optimizer steps, in an order that depends on the seed and the epoch alone.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

import torch
from torch import Tensor

from lisatune.data.packing import pack
from lisatune.data.tokenize import IGNORED, Encoded

PACK_WINDOW = 1000  # documents packed, or shuffled in a stream, at a time


@dataclass(frozen=True)
class Batch:
    """The rows of one optimizer step; all (B, T), ids, labels and positions int64.

    ``labels`` are shifted already: ``labels[b, t]`` is the token to predict at ``t``, or -100. ``position_ids`` begin
    anew with each document, which is how the attention knows to keep documents apart. ``is_token`` is False on padding.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    is_token: Tensor

    @property
    def num_labelled(self) -> int:
        """Tokens that are learnt: the divisor of the step's loss."""
        return int((self.labels != IGNORED).sum())

    @property
    def num_tokens(self) -> int:
        """Tokens of documents, padding not counted."""
        return int(self.is_token.sum())

    def split(self, num_rows: int) -> Iterator[Batch]:
        """Micro-batches of at most ``num_rows`` rows, without the columns that only other rows need."""
        for start in range(0, len(self.input_ids), num_rows):
            rows = slice(start, start + num_rows)
            labels = self.labels[rows]
            used = (labels != IGNORED).any(0).nonzero()
            width = int(used[-1]) + 1 if len(used) else 1
            yield Batch(*(t[rows, :width] for t in (self.input_ids, self.labels, self.position_ids, self.is_token)))

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``."""
        return Batch(*(t.to(device) for t in (self.input_ids, self.labels, self.position_ids, self.is_token)))


def collate(rows: Sequence[Sequence[Encoded]], pad_id: int) -> Batch:
    """Lay rows of documents side by side, padded on the right to the longest.

    Padding needs no mask: attention is causal, and what stands after the last label is never used.
    """
    width = max(sum(len(document) for document in row) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), IGNORED)
    positions = torch.arange(width).repeat(len(rows), 1)
    is_token = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        start = 0
        for document in row:
            end = start + len(document)
            ids[b, start:end] = torch.tensor(document.ids)
            # shifted: position t predicts the token at t + 1, never the first token of the next document
            is_token[b, start:end] = True
            labels[b, start : end - 1] = torch.tensor(document.labels[1:], dtype=torch.int64)
            if len(row) > 1:
                positions[b, end:] = torch.arange(width - end)  # the next document begins at 0 again
            start = end
    return Batch(ids, labels, positions, is_token)


class Loader:
    """Batches of optimizer steps, epoch after epoch without end.

    Args:
        documents: A sequence, shuffled anew each epoch; or any other iterable that can be iterated again (a stream),
            shuffled within a window.
        rows_per_step: Rows of a batch; the last one of an epoch may have fewer.
        max_length: Tokens of a row.
        pad_id: Token that fills rows up.
        packing: Fill rows with several documents.
        seed: Of the order.
        shuffle: False keeps the order given.
    Raises: ValueError if there is no document.
    """

    def __init__(
        self,
        documents: Iterable[Encoded],
        *,
        rows_per_step: int,
        max_length: int,
        pad_id: int,
        packing: bool = False,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        self.documents = documents
        self.rows_per_step = rows_per_step
        self.max_length = max_length
        self.pad_id = pad_id
        self.packing = packing
        self.seed = seed
        self.shuffle = shuffle

    def __iter__(self) -> Iterator[Batch]:
        for epoch in count():
            empty = True
            for batch in self.epoch(epoch):
                empty = False
                yield batch
            if empty:
                raise ValueError("the data set holds nothing to learn")

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch; a pure function of the documents, the seed and ``epoch``."""
        rows = self._rows(epoch)
        while chunk := list(islice(rows, self.rows_per_step)):
            yield collate(chunk, self.pad_id)

    def num_steps(self) -> int:
        """Batches in the first epoch; counted without making them. Packing may give another epoch one more or less."""
        return -(-sum(1 for _ in self._rows(0)) // self.rows_per_step)

    def _rows(self, epoch: int) -> Iterator[list[Encoded]]:
        order = random.Random(f"{self.seed}/{epoch}")
        for window in self._windows(order):
            if not self.packing:
                yield from ([document] for document in window)
                continue
            rows = pack([len(document) for document in window], self.max_length)
            if self.shuffle:
                order.shuffle(rows)  # longest first would order the steps by length
            yield from ([window[i] for i in row] for row in rows)

    def _windows(self, order: random.Random) -> Iterator[list[Encoded]]:
        documents = self.documents
        if self.shuffle and isinstance(documents, Sequence):
            documents = order.sample(documents, len(documents))
        stream = iter(documents)
        while window := list(islice(stream, PACK_WINDOW)):
            if self.shuffle and not isinstance(self.documents, Sequence):
                order.shuffle(window)
            yield window
