"""Examples tokenized as they are needed, some hundreds at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from lisatune.data.formats import Example
from lisatune.data.loader import WINDOW
from lisatune.data.tokenize import Encoded, Encoder
from lisatune.errors import BadRowError, UserError

GROUP_EXAMPLES = 64


class EncodedStream:
    """Windows of at least ``WINDOW`` documents (the last one: what is left), encoded from ``examples`` when asked for.

    Args:
        encoder: Tokenizes; its counts grow with each example that is encoded.
        examples: Iterated anew for each call; those before ``first`` are read and left.
    """

    def __init__(self, encoder: Encoder, examples: Iterable[Example]) -> None:
        self.encoder = encoder
        self.examples = examples

    def windows(self, first: int) -> Iterator[tuple[int, list[Encoded]]]:
        """Windows with the number of their first example, from that on which begins at example ``first``."""
        examples = islice(iter(self.examples), first, None)
        while True:
            begin, window = first, list[Encoded]()
            try:
                while len(window) < WINDOW and (group := list(islice(examples, GROUP_EXAMPLES))):
                    window += self.encoder(group)
                    first += len(group)
            except UserError as error:
                raise BadRowError(str(error)) from error
            if first == begin:
                return
            yield begin, window
