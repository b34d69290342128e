"""Rows of judged answers: a prompt with two answers, or with one and whether it is good. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lisatune.data.files import MAX_SHOWN, shown
from lisatune.data.formats import COLUMNS, Example, Message, Row, RowParser, RowReader, from_json, kind
from lisatune.errors import UserError

PAIRS = ("chosen", "rejected")
JUDGED = (*PAIRS, "completion", "label", "margin")
PROMPTS = ("prompt", "messages", "conversations", "question", "problem", "query", "input")
WORDS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True)
class Judged(Example):
    """A prompt (``messages``), and answers to it that somebody has judged.

    Attributes:
        answers: By the names of their columns: ``chosen`` and ``rejected``, or ``completion``.
        label: Whether the completion is good.
        margin: By how much the chosen answer is better.
    """

    answers: Mapping[str, tuple[Message, ...]] = field(default_factory=dict)
    label: bool | None = None
    margin: float | None = None

    def __repr__(self) -> str:
        """What is learned, as of any example."""
        return f"{super().__repr__()[:-1]}, answers={self.answers!r}, label={self.label!r}, margin={self.margin!r})"

    def as_row(self) -> dict[str, Any]:
        """The row as TRL takes it."""
        chats = {"prompt": self.messages, **self.answers}
        row: dict[str, Any] = {name: [dict(turn) for turn in chat] for name, chat in chats.items()}
        return row | {
            name: value for name, value in (("label", self.label), ("margin", self.margin)) if value is not None
        }


@dataclass(frozen=True)
class JudgedParser(RowParser):
    """Reads rows of judged answers.

    ==================  ===============================================================================================
    column              may be
    ==================  ===============================================================================================
    prompt              a string, or a list of turns; so may be messages, conversations, question. ``instruction`` and
                        ``input`` make one too. It may be missing if both answers are lists that begin alike.
    chosen, rejected    a string, a turn, or a list of turns, with or without the prompt
    completion, label   the same, and true or false
    margin              a number
    ==================  ===============================================================================================

    Args:
        wanted: The columns that the task learns from.
    Example:
        >>> row = Row("x.jsonl, line 1", {"prompt": "2+2?", "chosen": "4", "rejected": "5"})
        >>> JudgedParser()(row).answers["rejected"]
        ({'role': 'assistant', 'content': '5'},)
    """

    known: ClassVar[tuple[str, ...]] = (*COLUMNS, *JUDGED, "role", "content")

    wanted: tuple[str, ...] = PAIRS

    def __call__(self, row: Row) -> Judged:
        """The judged answers of ``row``.

        Raises: UserError that names the place and the remedy.
        """
        return _JudgedReader(row, self).judged(self.wanted)


class _JudgedReader(RowReader):
    """Reads one row of judged answers."""

    def judged(self, wanted: Sequence[str]) -> Judged:
        """See ``JudgedParser``."""
        if missing := [name for name in wanted if name not in self.columns and name != "margin"]:
            raise self._not_of_this_task(missing[0], wanted)
        names = [name for name in wanted if name not in ("label", "margin")]
        answers = {name: self._answer(name) for name in names}
        prompt = self._prompt(answers)
        answers = {name: self._after(prompt, name, chat) for name, chat in answers.items()}
        messages, _ = self._before(prompt, [0.0] * len(prompt))
        return Judged(
            self.row.where, tuple(messages), tools=tuple(self._tools()),
            answers={name: tuple(chat) for name, chat in answers.items()},
            label=self._label() if "label" in wanted else None,
            margin=self._margin() if "margin" in wanted and "margin" in self.columns else None,
            left_out=self._unused(), source=self.parser.source,
        )  # fmt: skip

    def _answer(self, column: str) -> list[Message]:
        value = self._parsed_turns(column)
        if isinstance(value, str):
            return [Message(role="assistant", content=self._whole(column, value))]
        return self._chat([value] if isinstance(value, Mapping) else value, column)[0]

    def _parsed_turns(self, column: str) -> Any:
        """A string, a turn, or a list of turns, which may be written as JSON."""
        value = self._take(column)
        found = from_json(value)
        turns = found if isinstance(found, list) else [found]
        if isinstance(value, str) and not all(
            isinstance(turn, Mapping) and {"role", "from"} & set(turn) for turn in turns
        ):
            found = value  # an answer that happens to be JSON
        if not isinstance(found, str | Mapping | list):
            raise self._error(f"'{column}' is {kind(value)}, but must be a string or a list of turns")
        return found

    def _prompt(self, answers: Mapping[str, list[Message]]) -> list[Message]:
        """The prompt that the row has, or what its answers begin with alike."""
        if "instruction" in self.columns:
            instruction, extra = self._string("instruction"), self._string("input", default="")
            return [Message(role="user", content=f"{instruction}\n\n{extra}" if extra.strip() else instruction)]
        column = next((name for name in PROMPTS if name in self.columns), None)
        if column is not None:
            value = self._parsed_turns(column)
            if isinstance(value, str):
                return [Message(role="user", content=self._whole(column, value))]
            return self._chat([value] if isinstance(value, Mapping) else value, column)[0]
        first, *others = answers.values()
        length = 0
        while all(length < len(chat) - 1 and chat[length] == first[length] for chat in (first, *others)) and others:
            length += 1
        if not length:
            raise self._error(
                "there is no prompt: give a column 'prompt', or answers that are lists of turns and begin alike"
            )
        return first[:length]

    def _after(self, prompt: list[Message], column: str, chat: list[Message]) -> list[Message]:
        """An answer without the prompt, if it begins with that."""
        rest = chat[len(prompt) :] if chat[: len(prompt)] == prompt else chat
        if not rest or rest[0]["role"] != "assistant":
            raise self._error(f"'{column}' is no answer to the prompt: after it, the first turn must be an assistant's")
        return rest

    def _label(self) -> bool:
        value = self._take("label")
        found = WORDS.get(str(value).strip().lower()) if isinstance(value, str | bool | int) else None
        if found is None:
            raise self._error(f"'label' is {shown(value)}, but must be true (a good answer) or false (a bad one)")
        return found

    def _margin(self) -> float:
        value = self._take("margin")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._error(f"'margin' is {shown(value)}, but must be a number")
        return float(value)

    def _not_of_this_task(self, missing: str, wanted: Sequence[str]) -> UserError:
        others = {"label": "task=dpo, orpo or reward", "chosen": "task=kto"}
        other = others["label"] if set(PAIRS) <= set(self.columns) and "label" in wanted else ""
        other = others["chosen"] if {"completion", "label"} <= set(self.columns) and "chosen" in wanted else other
        needed = " and ".join(name for name in wanted if name != "margin")
        names = ", ".join(shown(name) for name in list(self.columns)[:MAX_SHOWN]) or "(none)"
        hint = f"; this row has the columns of {other}" if other else f"; this row has the columns {names}"
        return self._error(
            f"'{missing}' is missing: this task learns from a prompt with {needed}{hint}; if a column has another name, set "
            f"columns={{{missing}: NAME}}"
        )
