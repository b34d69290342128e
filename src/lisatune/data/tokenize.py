"""Messages or text to token ids and labels."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lisatune.data.formats import Example, Message
from lisatune.errors import UserError

IGNORED = -100
BATCH_EXAMPLES = 512

# For a tokenizer that brings no chat template of its own; saved with the model, so that chat and training agree.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Encoded:
    """Token ids of one document and which of them are learnt; both of length T, ``labels[t]`` is ``ids[t]`` or -100.

    ``where`` is the place of its row: ``file, line 3``.
    """

    ids: array[int]
    labels: array[int]
    where: str = ""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Counts:
    """What became of the rows; ``read`` is the sum of ``used`` and ``refused``."""

    read: int = 0
    used: int = 0
    refused: int = 0
    truncated: int = 0
    labelled_tokens: int = 0
    tokens: int = 0

    def describe(self) -> str:
        """The counts, in one line."""
        text = f"{self.read:,} rows read, {self.used:,} used, {self.tokens:,} tokens, {self.labelled_tokens:,} of them learnt"
        if self.truncated:
            text += f"; {self.truncated:,} rows cut at max_length"
        if self.refused:
            text += f"; {self.refused:,} refused, whose answer is empty or begins beyond max_length"
        return text


class Encoder:
    """Examples to ``Encoded`` documents of at most ``max_length`` tokens.

    A chat is rendered by the tokenizer's own template and cut where its assistant turns begin and end; the pieces are
    tokenized one by one, so the prompt's ids are those that generation will see. Learnt are the assistant turns with
    their end-of-turn token. Text is learnt whole, with the beginning- and end-of-text tokens that the tokenizer has.
    A chat that is too long loses its end; text that is too long becomes several documents.

    Args:
        tokenizer: A Hugging Face tokenizer; one without a chat template is given a plain one.
        max_length: Tokens of a document at most, at least 2.
        completion_only_loss: False learns the prompts of chats too.
    """

    def __init__(self, tokenizer: Any, max_length: int, *, completion_only_loss: bool = True) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.completion_only_loss = completion_only_loss
        self.counts = Counts()
        if tokenizer.chat_template is None:
            tokenizer.chat_template = PLAIN_TEMPLATE

    def __call__(self, examples: Iterable[Example]) -> Iterator[Encoded]:
        """Encode ``examples`` in order, some hundreds at a time; what holds nothing to learn is counted and left out."""
        stream = iter(examples)
        while chunk := list(islice(stream, BATCH_EXAMPLES)):
            pieces = [self._pieces(example) for example in chunk]
            chats = [text for piece in pieces for text, kind in piece if kind != "text"]
            texts = [text for piece in pieces for text, kind in piece if kind == "text"]
            ids = {False: iter(self._tokenize(chats, special=False)), True: iter(self._tokenize(texts, special=True))}
            for example, piece in zip(chunk, pieces, strict=True):
                yield from self._join([(next(ids[kind == "text"]), kind) for _, kind in piece], example.where)

    def _tokenize(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        if not texts:
            return []
        out: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=special)["input_ids"]
        return out

    def _pieces(self, example: Example) -> list[tuple[str, str]]:
        """Texts and their kinds: ``text``, or by turns ``prompt`` and ``answer``."""
        if example.text is not None:
            return [(example.text, "text")]
        messages = list(example.messages)
        whole = self._render(example, messages)
        pieces, done = [], 0
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = self._render(example, messages[:turn], add_generation_prompt=True)
            end = self._render(example, messages[: turn + 1]).rstrip()
            if not (whole.startswith(start) and whole.startswith(end) and done <= len(start) <= len(end)):
                raise UserError(
                    f"{example.where}: the chat template changes earlier turns as the chat goes on, so answers cannot be "
                    "told from prompts; set completion_only_loss=false or give the tokenizer another chat_template"
                )
            pieces += [(whole[done : len(start)], "prompt"), (whole[len(start) : len(end)], "answer")]
            done = len(end)
            if not message["content"].strip():
                pieces[-1] = ("", "answer")
        return pieces

    def _render(self, example: Example, messages: list[Message], **options: Any) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # templates raise what they like, by jinja
            raise UserError(f"{example.where}: the chat template refuses this chat ({error})") from error
        return text

    def _join(self, pieces: list[tuple[list[int], str]], where: str) -> Iterator[Encoded]:
        ids, labels = array("i"), array("i")
        for piece, kind in pieces:
            ids.extend(piece)
            learnt = kind != "prompt" or not self.completion_only_loss
            labels.extend(piece if learnt else [IGNORED] * len(piece))
        is_text = bool(pieces) and pieces[0][1] == "text"
        end = self.tokenizer.eos_token_id
        if is_text and len(ids) and end is not None and ids[-1] != end:
            ids.append(end)
            labels.append(end)
        self.counts.read += 1
        step = self.max_length if is_text else max(len(ids), 1)
        documents = [
            Encoded(ids[start : start + self.max_length], labels[start : start + self.max_length], where)
            for start in range(0, len(ids), step)
        ]
        # the first token of a document is predicted from nothing, so a label there is none
        usable = [d for d in documents if any(label != IGNORED for label in d.labels[1:])]
        if not usable:
            self.counts.refused += 1
            return
        self.counts.used += 1
        self.counts.truncated += not is_text and len(ids) > self.max_length
        for document in usable:
            self.counts.tokens += len(document)
            self.counts.labelled_tokens += sum(label != IGNORED for label in document.labels[1:])
            yield document
