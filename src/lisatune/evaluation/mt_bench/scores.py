"""Grades to a table: a model's mean in each category, with its standard error over questions. Needs no torch."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from lisatune.evaluation.mt_bench.questions import Question
from lisatune.evaluation.mt_bench.verdicts import Verdict

Turns = Sequence[Verdict]


def score(questions: Sequence[Question], verdicts: Sequence[Turns]) -> dict[str, Any]:
    """A model's scores, overall and by category.

    A question's score is the mean of its turns' grades, a category's the mean of its questions', the model's the mean of
    all questions'. A verdict without a grade counts as none, and is counted in ``num_unparsable``; a question without any
    grade is left out.

    Args:
        questions: The questions, in any order.
        verdicts: One for each turn of each of ``questions``.
    Returns: ``mean`` and ``standard_error`` (None of fewer than one and two questions), ``first_turn``, ``second_turn``,
        ``num_questions`` that have a score, ``num_verdicts``, ``num_unparsable``, ``unparsable`` by reason; and the same of
        each category in ``by_category``.
    Example:
        >>> result = score([Question("1", "maths", ("a", "b"))], [[Verdict(7), Verdict(None, "no grade")]])
        >>> result["mean"], result["second_turn"], result["unparsable"]
        (7.0, None, {'no grade': 1})
    """
    by_category = {
        category: _score([turns for q, turns in zip(questions, verdicts, strict=True) if q.category == category])
        for category in categories_of(questions)
    }
    return _score(verdicts) | {"by_category": by_category}


def categories_of(questions: Sequence[Question]) -> list[str]:
    """The categories, in the order in which they first come."""
    return list(dict.fromkeys(question.category for question in questions))


def _score(verdicts: Sequence[Turns]) -> dict[str, Any]:
    scores = [_mean([v.grade for v in turns if v.grade is not None]) for turns in verdicts]
    found = [value for value in scores if value is not None]
    every = [verdict for turns in verdicts for verdict in turns]
    reasons = Counter(verdict.reason for verdict in every if verdict.grade is None)
    return {
        "mean": _mean(found),
        "standard_error": statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None,
        "first_turn": _mean([turns[0].grade for turns in verdicts if turns[0].grade is not None]),
        "second_turn": _mean([turns[1].grade for turns in verdicts if turns[1].grade is not None]),
        "num_questions": len(found),
        "num_verdicts": len(every),
        "num_unparsable": sum(reasons.values()),
        "unparsable": dict(sorted(reasons.items())),
    }


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def show(result: dict[str, Any]) -> RenderableType:
    """The table of an evaluation (models down, categories across), and what has to be known beside it."""
    from lisatune.pages.terminal import Tables

    head = ["", *result["categories"], "mean", "1st turn", "2nd turn", "no grade"]
    rows = []
    for entry in result["models"]:
        cells = [_shown(entry["by_category"][category]["mean"]) for category in result["categories"]]
        error = "" if entry["standard_error"] is None else f" ± {entry['standard_error']:.2f}"
        turns = [_shown(entry["first_turn"]), _shown(entry["second_turn"])]
        missing = f"{entry['num_unparsable']} of {entry['num_verdicts']}"
        rows.append([entry["name"], *cells, _shown(entry["mean"]) + error, *turns, missing])
    return Group(Tables(head, rows), *(Text(note) for note in result["notes"]))


def notes_of(result: dict[str, Any]) -> list[str]:
    """What the numbers are, and what is the matter with them."""
    notes = [
        f"Grades from 1 to 10 by {result['judge']['model']}; ± is the standard error over {result['num_questions']} questions, "
        "and knows nothing of the judge's own errors."
    ]
    for entry in result["models"]:
        if entry["num_unparsable"]:
            reasons = ", ".join(f"{reason} {num}" for reason, num in entry["unparsable"].items())
            notes.append(
                f"{entry['name']}: {entry['num_unparsable']} verdicts without a grade are left out ({reasons})."
            )
        if entry["num_cut"]:
            notes.append(f"{entry['name']}: {entry['num_cut']} answers were cut at the limit of length.")
    if len(result["models"]) > 1 and any(entry["num_unparsable"] for entry in result["models"]):
        notes.append("So the models are not compared over the same questions.")
    return notes


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
