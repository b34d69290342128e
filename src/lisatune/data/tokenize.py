"""Messages or text to token ids and labels."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import accumulate, chain, islice
from typing import Any, Literal

from lisatune.data.formats import Example
from lisatune.data.read import OnBadRow, stop_and_tell
from lisatune.data.render import PLAIN_TEMPLATE, LossOn, Piece, Renderer, plain_template
from lisatune.errors import UserError

__all__ = ["IGNORED", "PLAIN_TEMPLATE", "Counts", "Encoded", "Encoder", "plain_template"]

IGNORED = -100
BATCH_EXAMPLES = 512
TooLong = Literal["truncate", "drop", "refuse"]
MAX_TOLD = 5  # bad rows that are named one by one


@dataclass(frozen=True)
class Encoded:
    """Token ids of one document and which of them are learned; both of length T, ``labels[t]`` is ``ids[t]`` or -100.

    ``where`` is the place of its row: ``file, line 3``. ``weights`` are what each label's loss counts; None: 1 each.
    ``source`` is the number of its data set, where there are several.
    """

    ids: array[int]
    labels: array[int]
    where: str = ""
    weights: array[float] | None = None
    source: int = 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Counts:
    """What became of the rows; ``read`` is the sum of ``used`` and ``refused``.

    Attributes:
        reasons: Why rows were refused, each with their number.
        left_out: Columns and keys that play no part, each with the number of rows that have them.
        bad: Messages of the first rows that ``on_bad_row=skip`` left out.
        ends: The tokens that end learned answers and texts.
        cut_tokens: Tokens that rows lost at max_length.
        chats: Rows used that are chats.
        documents: Documents that the rows used became.
    """

    read: int = 0
    used: int = 0
    refused: int = 0
    truncated: int = 0
    cut_tokens: int = 0
    labelled_tokens: int = 0
    tokens: int = 0
    chats: int = 0
    documents: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    ends: Counter[int] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def refuse(self, reason: str) -> None:
        """Count a row that is not used."""
        self.read += 1
        self.refused += 1
        self.reasons[reason] += 1

    def skip(self, error: UserError) -> None:
        """Count a bad row that is left out: what ``on_bad_row=skip`` does."""
        self.refuse("a bad row")
        if len(self.bad) < MAX_TOLD:
            self.bad.append(str(error))

    def add(self, other: Counts) -> None:
        """Count what ``other`` has counted too."""
        for name in (
            "read",
            "used",
            "refused",
            "truncated",
            "cut_tokens",
            "labelled_tokens",
            "tokens",
            "chats",
            "documents",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("reasons", "left_out", "ends"):
            getattr(self, name).update(getattr(other, name))
        self.bad = [*self.bad, *other.bad][:MAX_TOLD]

    def describe(self) -> str:
        """The counts, in one line."""
        text = f"{self.read:,} rows read, {self.used:,} used, {self.tokens:,} tokens, {self.labelled_tokens:,} of them learned"
        if self.truncated:
            text += f"; {self.truncated:,} rows cut at max_length, of {self.cut_tokens:,} tokens"
        if self.refused:
            text += f"; {self.refused:,} refused ({_counted(self.reasons)})"
        if self.left_out:
            text += f"; not used: {_counted(self.left_out, rows=True)}"
        return text + "".join(f"; {message}" for message in self.bad)


def _counted(counter: Counter[str], *, rows: bool = False) -> str:
    return ", ".join(
        f"{name} in {count:,} row{'s' * (count != 1)}" if rows else f"{count:,}: {name}"
        for name, count in counter.most_common()
    )


class Encoder:
    """Examples to ``Encoded`` documents of at most ``max_length`` tokens.

    A chat is rendered by the tokenizer's own template and cut where the answers that are learned begin and end, so the
    prompt's ids are those that generation will see. Learnt are the assistant's turns with their end-of-turn token; where
    the template has none, the end-of-text token follows. Text is learned whole, with the beginning- and end-of-text
    tokens that the tokenizer has, once each. A chat that is too long loses its end; text that is too long becomes several
    documents.

    Args:
        tokenizer: A Hugging Face tokenizer; one without a chat template is given a plain one with the first chat.
        max_length: Tokens of a document at most, at least 2.
        completion_only_loss: False learns the prompts of chats too, as ``loss_on="all"`` does.
        loss_on: What is learned of a chat: all answers, the last one, or all.
        too_long: What is done with a chat of more tokens than ``max_length``.
        num_embeddings: Rows of the model's embedding; a row with a token beyond them is bad. None: not looked at.
        today: What a chat template is told as the date; the day's own, if not given.
        on_bad_row: ``stop`` raises the error of a bad row, ``skip`` counts it.
    Attributes:
        lengths: If it is made an array, the tokens of each row are added to it as they were before anything was cut.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        *,
        completion_only_loss: bool = True,
        loss_on: LossOn = "answers",
        too_long: TooLong = "truncate",
        num_embeddings: int | None = None,
        today: date | None = None,
        on_bad_row: Literal["stop", "skip"] = "stop",
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.loss_on: LossOn = loss_on if completion_only_loss else "all"
        self.too_long = too_long
        self.num_embeddings = num_embeddings
        self.today = today
        self.counts = Counts()
        self.lengths: array[int] | None = None
        self.on_bad_row = on_bad_row
        self._renderer: Renderer | None = None
        self._adds_space = _adds_space(tokenizer)
        self._backend = _plain_backend(tokenizer)
        self._end_ids = {*getattr(tokenizer, "added_tokens_decoder", {}), *tokenizer.all_special_ids}

    @property
    def on_bad(self) -> OnBadRow:
        """What is done with the error of a bad row."""
        return self.counts.skip if self.on_bad_row == "skip" else stop_and_tell

    @property
    def renderer(self) -> Renderer:
        """Chats in the tokenizer's template; asking for it gives the tokenizer a plain one if it has none."""
        if self._renderer is None:
            if self.tokenizer.chat_template is None:
                self.tokenizer.chat_template = plain_template(self.tokenizer)
            self._renderer = Renderer(self.tokenizer, self.loss_on, self.today)
        return self._renderer

    def __call__(self, examples: Iterable[Example]) -> Iterator[Encoded]:
        """Encode ``examples`` in order, some hundreds at a time; what holds nothing to learn is counted and left out."""
        stream = iter(examples)
        while chunk := list(islice(stream, BATCH_EXAMPLES)):
            for documents in self.encode(chunk):
                yield from documents

    def encode(self, examples: Sequence[Example]) -> Iterator[list[Encoded]]:
        """The documents of each of ``examples``; none for a row that is left out."""
        rows = [self._pieces(example) for example in examples]
        chats = [row for some in rows for row in some or () if isinstance(row, list)]
        texts = [row for some in rows for row in some or () if isinstance(row, str)]
        encoded = self._exact(chats)
        text_ids = iter(self._tokenize(texts, special=True))
        for example, some in zip(examples, rows, strict=True):
            if some is None:
                yield []
            elif example.text is not None:
                yield self._finish(example, [self._text(next(text_ids), example.text)])
            else:
                yield self._finish(example, [self._chat(*one) for _ in some for one in next(encoded)])

    # -- to pieces ---------------------------------------------------------------------------------------------------

    def _pieces(self, example: Example) -> list[list[Piece]] | list[str] | None:
        """The rows of a chat in pieces, or a text; None if it is left out, which is counted."""
        if example.text is not None:
            if not example.text.strip():
                self.counts.refuse("blank text")
                return None
            return [self._once_ended(example.text)]
        try:
            rendered = self.renderer(example)
        except UserError as error:
            self.on_bad(error)
            return None
        self.counts.left_out.update(rendered.missing)
        if not rendered.rows:
            self.counts.refuse(rendered.why)
            return None
        return rendered.rows

    def _once_ended(self, text: str) -> str:
        end = self.tokenizer.eos_token
        return text.rstrip() if end and text.rstrip().endswith(end) else text

    # -- to ids ------------------------------------------------------------------------------------------------------

    def _tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        if not texts:
            return []
        if self._backend is None:
            out: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=special)["input_ids"]
            return out
        # a call for the first text sets the backend up; for the others it is asked itself, and leaves offsets out
        first: list[list[int]] = self.tokenizer([texts[0]], add_special_tokens=special)["input_ids"]
        others = self._backend.encode_batch_fast(list(texts[1:]), add_special_tokens=special)
        return [*first, *(encoding.ids for encoding in others)]

    def _exact(self, rows: Sequence[Sequence[Piece]]) -> Iterator[list[tuple[list[list[int]], Sequence[Piece]]]]:
        """The ids of each row's pieces, with the pieces.

        Generation tokenizes a prompt whole, with the answers in it. Where that gives other ids than the pieces do, such as
        after a prompt that ends in a space, each answer gets a row of its own.
        """
        ids = list(self._tokenize_chats(rows))
        several = [number for number, row in enumerate(rows) if len(row) > 2 and self.loss_on != "all"]
        whole = self._tokenize(["".join(piece.text for piece in rows[number][:-1]) for number in several])
        differ = {
            number
            for number, together in zip(several, whole, strict=True)
            if together != list(chain.from_iterable(ids[number][:-1]))
        }
        for number, row in enumerate(rows):
            if number not in differ:
                yield [(ids[number], row)]
                continue
            alone = [[Piece("".join(piece.text for piece in row[:k])), row[k]] for k in range(1, len(row), 2)]
            yield list(zip(self._tokenize_chats(alone), alone, strict=True))

    def _tokenize_chats(self, rows: Sequence[Sequence[Piece]]) -> Iterator[list[list[int]]]:
        """The ids of each row's pieces. The first piece's are those that generation sees; the others follow."""
        if not self._adds_space:
            ids = iter(self._tokenize([piece.text for row in rows for piece in row]))
            yield from ([next(ids) for _ in row] for row in rows)
            return
        # such a tokenizer puts a space before each text, so a piece is what its text adds to the text before it
        ids = iter(self._tokenize([text for row in rows for text in accumulate(piece.text for piece in row)]))
        for row in rows:
            done: list[int] = []
            pieces = []
            for piece in row:
                together = next(ids)
                is_longer = together[: len(done)] == done
                pieces.append(together[len(done) :] if is_longer else self._continued(piece.text))
                done = done + pieces[-1]
            yield pieces

    def _continued(self, text: str) -> list[int]:
        """The ids of ``text`` in the middle of another, where it shares a token with what is before it."""
        for before in ("\n", ":", "a"):
            start, both = self._tokenize([before, before + text])
            if both[: len(start)] == start:
                return both[len(start) :]
        return self._tokenize([text])[0]

    def _chat(self, pieces: list[list[int]], row: Sequence[Piece]) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        for piece, told in zip(pieces, row, strict=True):
            ids += piece
            weights += [told.weight] * len(piece)
        end = self.tokenizer.eos_token_id
        if end is not None and ids and ids[-1] not in self._end_ids:
            ids.append(end)
            weights.append(row[-1].weight)
        return ids, weights

    def _text(self, ids: list[int], text: str) -> tuple[list[int], list[float]]:
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        while begin is not None and ids[:2] == [begin, begin]:  # the text has its own, and the tokenizer adds one
            ids = ids[1:]
        while end is not None and ids[-2:] == [end, end]:
            ids = ids[:-1]
        if set(ids) <= {begin, end}:
            return [], []
        if end is not None and ids[-1] != end:
            ids = [*ids, end]
        return ids, [1.0] * len(ids)

    # -- to documents ------------------------------------------------------------------------------------------------

    def _finish(self, example: Example, rows: list[tuple[list[int], list[float]]]) -> list[Encoded]:
        """The documents of a row, counted."""
        is_text, longest = example.text is not None, max(len(ids) for ids, _ in rows)
        try:
            self._check(example, rows)
        except UserError as error:
            self.on_bad(error)
            return []
        if self.lengths is not None:
            self.lengths.extend(len(ids) for ids, _ in rows)
        too_long = not is_text and longest > self.max_length
        if too_long and self.too_long == "refuse":
            raise UserError(
                f"{example.where}: has {longest:,} tokens, more than max_length={self.max_length}; raise it, or leave "
                "excess_length_strategy=refuse out"
            )
        if too_long and self.too_long == "drop":
            self.counts.refuse("longer than max_length")
            return []
        documents = [
            document
            for number, (ids, weights) in enumerate(rows, start=1)
            for document in self._documents(ids, weights, example, f", answer {number}" * (len(rows) > 1))
        ]
        if not documents:
            reason = "the answer begins beyond max_length" if longest > self.max_length else "nothing to learn"
            self.counts.refuse("blank text" if is_text and not longest else reason)
            return []
        if too_long:
            self.counts.truncated += 1
            self.counts.cut_tokens += sum(max(0, len(ids) - self.max_length) for ids, _ in rows)
        self._count(example, documents, truncated=too_long)
        return documents

    def _check(self, example: Example, rows: Sequence[tuple[list[int], list[float]]]) -> None:
        limit = self.num_embeddings
        for ids, _ in rows:
            if limit is not None and ids and max(ids) >= limit:
                token = self.tokenizer.convert_ids_to_tokens(max(ids))
                raise UserError(
                    f"{example.where}: holds the token '{token}' ({max(ids)}), but the model has embeddings for {limit:,} "
                    "tokens only; remove it from the row, or use the tokenizer of this model"
                )

    def _documents(self, ids: list[int], weights: list[float], example: Example, ending: str) -> Iterator[Encoded]:
        is_text, where = example.text is not None, example.where + ending
        scaled = not {0.0, 1.0}.issuperset(weights)
        for start in range(0, len(ids), self.max_length if is_text else max(len(ids), 1)):
            part = slice(start, start + self.max_length)
            own = weights[part]
            # the first token of a document is predicted from nothing, so a label there is none
            if any(own[1:]):
                labels = array(
                    "i", [token if weight else IGNORED for token, weight in zip(ids[part], own, strict=True)]
                )
                yield Encoded(array("i", ids[part]), labels, where, array("f", own) if scaled else None, example.source)

    def _count(self, example: Example, documents: Sequence[Encoded], *, truncated: bool) -> None:
        counts = self.counts
        counts.read += 1
        counts.used += 1
        counts.chats += example.text is None
        counts.documents += len(documents)
        counts.left_out.update(example.left_out)
        for document in documents:
            counts.tokens += len(document)
            counts.labelled_tokens += len(document) - 1 - document.labels[1:].count(IGNORED)
            last = document.labels[-1]
            ends = {self.tokenizer.eos_token_id} if example.text is not None else self._end_ids
            if not truncated and last in ends:
                counts.ends[last] += 1


def _plain_backend(tokenizer: Any) -> Any:
    """What does the work of a tokenizer of transformers that adds nothing to it; else None."""
    from transformers import PreTrainedTokenizerFast

    kind, plain = type(tokenizer), PreTrainedTokenizerFast
    own = any(getattr(kind, name, None) is not getattr(plain, name) for name in ("__call__", "_encode_plus"))
    return None if own else tokenizer.backend_tokenizer


def _adds_space(tokenizer: Any) -> bool:
    """Whether the tokenizer begins each text with a space, as Llama 2's does; a piece in the middle must not get one."""
    whole, first, second = tokenizer(["\nHello", "\n", "Hello"], add_special_tokens=False)["input_ids"]
    return list(whole) != [*first, *second]
