"""Two-turn questions and their reference answers, read and checked. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lisatune.data.formats import Row, read_rows
from lisatune.errors import UserError

NUM_TURNS = 2


@dataclass(frozen=True)
class Question:
    """One question of two turns.

    Attributes:
        id: What the file calls it, as text.
        category: Column of the table that it counts for.
        turns: What the user says in each turn.
        references: A good answer to each turn; empty where there is none.
    """

    id: str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...] = ()


def read_questions(questions: str, references: str | None = None, *, limit: int | None = None) -> list[Question]:
    """The questions of a file or hub name, in its order.

    A row has ``question_id`` (or ``prompt_id``), ``category``, ``turns`` (or ``prompt``), a list of two texts, and may
    have ``reference``, a list of as many: the form of FastChat's question.jsonl, and that of the copies on the hub.

    Args:
        questions: A path, or a hub name.
        references: A file of answers in FastChat's form (``question_id``, ``choices``), which take the place of all that
            the rows have: in FastChat's files those are short notes, and the judge is shown the answers instead.
        limit: Questions at most, from the categories by turns, so that each has its share.
    Raises: UserError naming file and line of a bad row, or if there is no question.
    """
    found: dict[str, Question] = {}
    for row in read_rows(questions):
        question = _question(row)
        if question.id in found:
            raise UserError(f"{row.where}: question_id {question.id} is in the file twice: give each question its own")
        found[question.id] = question
    if not found:
        raise UserError(f"{questions}: holds no questions; give a file in the form of FastChat's question.jsonl")
    if references is not None:
        found = {name: replace(question, references=()) for name, question in found.items()}
        for row in read_rows(references):
            name = _id(row)
            if name in found:  # a file of references may be that of a larger set
                found[name] = replace(found[name], references=_reference_turns(row))
    return _by_turns(list(found.values()), limit)


def _question(row: Row) -> Question:
    category = row.columns.get("category")
    if not isinstance(category, str) or not category.strip():
        raise UserError(f"{row.where}: 'category' must be a word, such as writing")
    turns = _texts(
        row, "turns" if "turns" in row.columns else "prompt", row.columns.get("turns", row.columns.get("prompt"))
    )
    if len(turns) != NUM_TURNS or not all(turn.strip() for turn in turns):
        raise UserError(f"{row.where}: 'turns' must be a list of {NUM_TURNS} texts, none of them empty")
    references = row.columns.get("reference") or []
    return Question(_id(row), category.strip(), turns, _texts(row, "reference", references)[:NUM_TURNS])


def _id(row: Row) -> str:
    value = row.columns.get("question_id", row.columns.get("prompt_id"))
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
        raise UserError(f"{row.where}: 'question_id' must be a number or a name")
    return str(value).strip()


def _texts(row: Row, column: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(text, str) for text in value):
        raise UserError(f"{row.where}: '{column}' must be a list of texts, one for each turn")
    try:
        "".join(value).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{row.where}: '{column}' holds half of a character, which is not valid text: fix it"
        ) from error
    return tuple(value)


def _reference_turns(row: Row) -> tuple[str, ...]:
    choices = row.columns.get("choices")
    first = choices[0] if isinstance(choices, Sequence) and choices else None
    if not isinstance(first, Mapping):
        raise UserError(f"{row.where}: 'choices' must be a list of answers, each with 'turns'")
    return _texts(row, "turns", first.get("turns"))[:NUM_TURNS]


def _by_turns(questions: list[Question], limit: int | None) -> list[Question]:
    """The first ``limit``, taken from the categories one after another; in the order of the file."""
    if limit is None or limit >= len(questions):
        return questions
    seen: dict[str, int] = {}
    place = {}
    for question in questions:
        place[question.id] = seen[question.category] = seen.get(question.category, -1) + 1
    chosen = {question.id for question in sorted(questions, key=lambda q: place[q.id])[:limit]}
    return [question for question in questions if question.id in chosen]
