"""Documents into rows of a fixed length."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack_in_order(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Fill one row after the other, so that documents keep their order; takes more rows than ``pack``.

    Example:
        >>> pack_in_order([5, 3, 4, 2], max_length=7)
        [[0], [1, 2], [3]]
    """
    rows: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if length > room:
            rows.append([])
            room = max_length
        rows[-1].append(index)
        room -= length
    return rows


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Best fit, longest first: each document goes where the least room is left over.

    Args:
        lengths: Tokens of each document, each 1 to ``max_length``.
        max_length: Tokens of a row.
    Returns: Rows, as lists of indices into ``lengths``; every document in exactly one row. Costs O(n log n) searches.
    Reference: Ding et al., Fewer Truncations Improve Language Modeling, arXiv:2404.10830.
    Example:
        >>> pack([5, 3, 4, 2], max_length=7)
        [[0, 3], [2, 1]]
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens free, row), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        best = bisect_left(room, (lengths[index], -1))
        if best < len(room):
            free, row = room.pop(best)
            rows[row].append(index)
        else:
            free, row = max_length, len(rows)
            rows.append([index])
        insort(room, (free - lengths[index], row))
    return rows
