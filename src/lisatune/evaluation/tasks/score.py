"""A score on a task, and how two of them differ. Needs neither torch nor the harness."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Score:
    """What a model reached on a task.

    Attributes:
        metric: The task's first metric, with its filter if it has one: ``exact_match, strict-match``.
        value: Value of the metric, over all documents.
        stderr: Its standard error; None if there is none, as of a single document.
        num_documents: How many were scored.
        num_fewshot: Examples shown before each.
        others: The task's other metrics.
        parts: Tasks of a group (MMLU's subjects), each with its own score.
        values: The metric of each document, in order; empty for a group whose value is not their mean.
    """

    metric: str
    value: float
    stderr: float | None
    num_documents: int
    num_fewshot: int = 0
    others: dict[str, float] = field(default_factory=dict)
    parts: dict[str, Score] = field(default_factory=dict)
    values: tuple[float, ...] = ()


def difference(before: Score, after: Score) -> dict[str, Any]:
    """What training has changed, with its standard error.

    On the same documents the error is that of the mean of the differences, document by document; where only the two
    errors are known, that of a difference of independent means, which is larger.

    Example:
        >>> before, after = (Score("acc", sum(v) / 4, 0.29, 4, values=v) for v in [(0., 0., 1., 1.), (0., 1., 1., 1.)])
        >>> difference(before, after)
        {'value': 0.25, 'stderr': 0.25, 'by_document': True}
    """
    value = after.value - before.value
    if len(before.values) == len(after.values) > 1:
        each = [b - a for a, b in zip(before.values, after.values, strict=True)]
        return {"value": value, "stderr": statistics.stdev(each) / math.sqrt(len(each)), "by_document": True}
    errors = (before.stderr, after.stderr)
    stderr = None if None in errors else math.hypot(*(e for e in errors if e is not None))
    return {"value": value, "stderr": stderr, "by_document": False}


def numbers(scores: Mapping[str, Score]) -> dict[str, float]:
    """Task to value, as a run's ``summary.json`` holds it; what is no number is left out."""
    return {name: float(score.value) for name, score in scores.items() if math.isfinite(score.value)}
