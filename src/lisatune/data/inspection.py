"""What a run would see of its data, before it starts."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any, NamedTuple

from lisatune.data.examples import Rows, spread
from lisatune.data.files import DataFile
from lisatune.data.loader import GROUPED_BATCHES
from lisatune.data.packing import pack
from lisatune.data.read import count_rows
from lisatune.data.tokenize import IGNORED, Counts, Encoded

WINDOW = 1000  # documents that are packed together, as the loader does


@dataclass(frozen=True)
class ShownRow:
    """A document as text.

    Attributes:
        where: The place of its row.
        pieces: Parts of the text, each with whether it is learned.
        ids: Its tokens.
        labels: The tokens that are learned, -100 for others.
        answer: Which answer of a judged row this is: ``chosen``, ``rejected`` or ``completion``.
        label: Whether a completion is good.
    """

    where: str
    pieces: list[tuple[str, bool]]
    ids: list[int]
    labels: list[int]
    answer: str = ""
    label: bool | None = None

    @property
    def title(self) -> str:
        """The place of the row, and which of its answers this is."""
        label = "" if self.label is None else ", good" if self.label else ", bad"
        return f"{self.where}: {self.answer}{label}" if self.answer else self.where


class PaddingShares(NamedTuple):
    """The share of padding in the batches of a run: as rows come, packed, and grouped by length; None for what cannot be."""

    plain: float
    packed: float | None = None
    grouped: float | None = None

    def told(self) -> str:
        """The shares that other settings would give, in words; empty if there are none."""
        others = {"packing=true": self.packed, "group_by_length=true": self.grouped}
        return ", ".join(f"{share:.0%} with {name}" for name, share in others.items() if share is not None)


@dataclass
class Inspection:
    """All that ``lisatune data`` shows.

    Attributes:
        names: The data sets, as they were given.
        described: What is read of each, in words.
        read: Files that are read.
        left_out: Files that are not, with the reason and their rows.
        counts: What became of the rows.
        lengths: Tokens of each row before anything is cut.
        max_length: Tokens that a row may have.
        batch_size: Rows of a micro-batch.
        padding: The share of what a run computes that is padding.
        rows: A few rows, spread evenly.
        special: The tokenizer's special tokens, which a view may set apart.
        held_out: Of each set to evaluate on: its name, the rows, and what became of them.
    """

    names: list[str]
    described: list[str]
    read: list[DataFile]
    left_out: list[tuple[DataFile, int | None]]
    counts: Counts
    lengths: Sequence[int]
    max_length: int
    batch_size: int
    padding: PaddingShares
    rows: list[ShownRow] = field(default_factory=list)
    special: list[str] = field(default_factory=list)
    held_out: list[tuple[str, Rows, Counts]] = field(default_factory=list)

    def as_dict(self, *, ids: bool = False) -> dict[str, Any]:
        """Plain values; ``ids`` adds tokens and labels to each row."""
        return {
            "data": self.names,
            "files": {
                "read": [_file(file, file.num_rows) for file in self.read],
                "left_out": [_file(file, rows) for file, rows in self.left_out],
            },
            "counts": _counts(self.counts),
            "held_out": [{"name": name, "data": rows.source.describe(), "counts": _counts(counts)} for name, rows, counts in self.held_out],
            "lengths": {"histogram": histogram(self.lengths, self.max_length), "longest": max(self.lengths, default=0), "max_length": self.max_length},
            "padding": {"batch_size": self.batch_size, "share": self.padding.plain, "share_with_packing": self.padding.packed,
                        "share_with_group_by_length": self.padding.grouped},
            "rows": [
                {"where": row.where, "pieces": [list(piece) for piece in row.pieces]}
                | ({"answer": row.answer} if row.answer else {}) | ({} if row.label is None else {"label": row.label})
                | ({"ids": row.ids, "labels": row.labels} if ids else {})
                for row in self.rows
            ],
        }  # fmt: skip


def _counts(counts: Counts) -> dict[str, Any]:
    numbers = {name: value for name, value in asdict(counts).items() if isinstance(value, int)}
    return numbers | {"reasons": dict(counts.reasons), "not_used": dict(counts.left_out), "bad": counts.bad}


def _file(file: DataFile, num_rows: int | None) -> dict[str, Any]:
    told = {"file": str(file.path), "rows": num_rows, "split": file.split, "config": file.config or None}
    return told | ({"reason": file.left_out} if file.left_out else {}) | ({"note": file.note} if file.note else {})


def inspect(
    train: Sequence[Rows], encoded: Sequence[tuple[Sequence[Encoded], Counts, Sequence[int]]], tokenizer: Any, *,
    max_length: int, batch_size: int, num_rows: int, seed: int = 0, held_out: Mapping[str, tuple[Rows, Counts]] | None = None,
) -> Inspection:  # fmt: skip
    """What the data sets of a run hold.

    Args:
        train: The data sets.
        encoded: Of each: its documents, what became of its rows, and their tokens before anything was cut.
        tokenizer: Writes documents as text.
        max_length: Tokens that a row may have.
        batch_size: Rows of a micro-batch.
        num_rows: How many documents are shown.
        seed: Seed of the order in which they would be trained.
        held_out: Of each set to evaluate on, by its name: the rows, and what became of them.
    """
    counts = Counts()
    for _, own, _ in encoded:
        counts.add(own)
    documents = [document for some, _, _ in encoded for document in _chosen(some, num_rows // len(encoded) or 1)]
    lengths = [length for _, _, own in encoded for length in own]
    cut = [min(length, max_length) for length in lengths]
    return Inspection(
        [rows.name for rows in train],
        [rows.source.describe() for rows in train],
        [file for rows in train for file in rows.source.told],
        [(file, count_rows(file)) for rows in train for file in rows.source.files if file.left_out],
        counts, lengths, max_length, batch_size,
        PaddingShares(padding(cut, batch_size, seed), padding(packed(cut, max_length), batch_size, seed), padding(cut, batch_size, seed, grouped=True)),
        [shown_row(document, tokenizer) for document in documents],
        special_texts(tokenizer),
        [(name, rows, counts) for name, (rows, counts) in (held_out or {}).items()],
    )  # fmt: skip


def _chosen(documents: Sequence[Encoded], number: int) -> Iterator[Encoded]:
    return (documents[i] for i in sorted(spread(len(documents), number)))


def shown_row(document: Encoded, tokenizer: Any) -> ShownRow:
    """``document`` as text, cut where learned and other tokens meet; the parts together are the whole text.

    A part is what its tokens add to the text before it, as a tokenizer may write the same token otherwise at a beginning.
    """
    ids, labels = list(document.ids), list(document.labels)
    ends = [t for t in range(1, len(ids)) if (labels[t] == IGNORED) != (labels[t - 1] == IGNORED)] + [len(ids)]
    pieces, text = [], ""
    for begin, end in zip([0, *ends], ends, strict=False):
        longer = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        part = longer[len(text) :] if longer.startswith(text) else tokenizer.decode(ids[begin:end])
        pieces.append((part, labels[begin] != IGNORED))
        text = longer
    return ShownRow(document.where, pieces, ids, labels)


def special_texts(tokenizer: Any) -> list[str]:
    """The special tokens of a tokenizer as text, longer ones first."""
    added = [str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special]
    return sorted({*added, *tokenizer.all_special_tokens}, key=lambda text: (-len(text), text))


def padding(lengths: Sequence[int], batch_size: int, seed: int = 0, of_row: int = 1, *, grouped: bool = False) -> float:
    """The share of padding in micro-batches of ``batch_size`` rows, each as wide as its longest text.

    A row has ``of_row`` texts, whose lengths follow one another. ``grouped`` is with ``group_by_length``.

    Example:
        >>> padding([1, 1, 4, 4], 4)
        0.375
    """
    if not lengths:
        return 0.0
    rows = [lengths[first : first + of_row] for first in range(0, len(lengths), of_row)]
    order = random.Random(f"{seed}/0").sample(rows, len(rows))
    if grouped:
        size = GROUPED_BATCHES * batch_size
        windows = [order[first : first + size] for first in range(0, len(order), size)]
        order = [row for window in windows for row in sorted(window, key=max, reverse=True)]
    batches = [list(chain(*order[first : first + batch_size])) for first in range(0, len(order), batch_size)]
    return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def packed(lengths: Sequence[int], max_length: int) -> list[int]:
    """The tokens of each row that documents of these lengths are packed into, as the loader packs them."""
    windows = [lengths[first : first + WINDOW] for first in range(0, len(lengths), WINDOW)]
    return [sum(window[i] for i in row) for window in windows for row in pack(window, max_length)]


def histogram(lengths: Sequence[int], limit: int | None = None, bins: int = 16) -> list[tuple[int, int, int]]:
    """Rows by their tokens, as (from, to, rows) with equal steps, from the shortest row to the longest.

    One step ends at ``limit`` where some rows are longer.

    Example:
        >>> histogram([1, 2, 2, 9], bins=3)
        [(1, 3, 3), (4, 6, 0), (7, 9, 1)]
        >>> histogram([1, 2, 2, 9], limit=4, bins=3)
        [(0, 1, 1), (2, 4, 2), (5, 7, 0), (8, 10, 1)]
    """
    if not lengths:
        return []
    begin, longest = min(lengths), max(lengths)
    step = -(-(longest - begin + 1) // bins)
    if limit is not None and begin <= limit < longest:
        begin = limit + 1 - step * -(-(limit + 1 - begin) // step)
    counts = array("q", [0]) * (-(-(longest - begin + 1) // step))
    for length in lengths:
        counts[(length - begin) // step] += 1
    return [(max(0, begin + i * step), begin + (i + 1) * step - 1, count) for i, count in enumerate(counts)]
