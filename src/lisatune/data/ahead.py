"""The next item of an iterator, made beside the work on the one before."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Ahead(Generic[Item]):
    """Takes the items of an iterator one after the other; the next one can be made in another thread meanwhile.

    Items and their order are those of the iterator, and so are its errors, which come when the item is taken. No more
    than one item is made ahead, and none that was not begun: whoever stops has read what a plain loop has read.

    Args:
        items: The iterator. From here on nobody else takes from it.
    Example:
        >>> with Ahead(iter("ab")) as ahead:
        ...     first = ahead.take()
        ...     ahead.begin()
        ...     second = ahead.take()  # has been made already, or is waited for
        >>> first + second
        'ab'
    """

    def __init__(self, items: Iterator[Item]) -> None:
        self._items = items
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="lisatune-batches")
        self._next: Future[Item] | None = None

    def __enter__(self) -> Ahead[Item]:
        return self

    def __exit__(self, *error: object) -> None:
        self._worker.shutdown(cancel_futures=True)

    def begin(self) -> None:
        """Begin to make the next item."""
        if self._next is None:
            self._next = self._worker.submit(next, self._items)

    def take(self) -> Item:
        """The next item.

        Raises: Whatever the iterator raises; StopIteration after its last item.
        """
        made, self._next = self._next, None
        return next(self._items) if made is None else made.result()
