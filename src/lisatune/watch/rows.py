"""Lines of a run's files as the page gets them: known columns of known types, in few digits. All else is left out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

MOST_LETTERS = 20_000  # the most letters of a text
MOST_ITEMS = 2_000  # the most items of a list
DIGITS = 6
Reader = Callable[[Any], Any]


def number(value: Any) -> float | int | None:
    """A finite number in a few digits; a whole one stays whole.

    Example:
        >>> number(0.123456789), number(7), number(float("nan")), number(True), number("7")
        (0.123457, 7, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, int):
        return value if abs(value) < 2**53 else None  # what a browser can count
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def text(value: Any) -> str | None:
    """A text, cut where it is very long."""
    if not isinstance(value, str):
        return None
    return value if len(value) <= MOST_LETTERS else f"{value[:MOST_LETTERS]} ..."


def _list_of(one: Reader) -> Reader:
    def read(value: Any) -> list[Any] | None:
        if not isinstance(value, list):
            return None
        return [found for found in map(one, value[:MOST_ITEMS]) if found is not None]

    return read


def _named(one: Reader) -> Reader:
    def read(value: Any) -> dict[str, Any] | None:
        if not isinstance(value, dict):
            return None
        pairs = ((str(text(str(name))), one(inner)) for name, inner in list(value.items())[:MOST_ITEMS])
        return {name: found for name, found in pairs if found is not None}

    return read


def _only(columns: Mapping[str, Reader]) -> Reader:
    def read(value: Any) -> dict[str, Any] | None:
        if not isinstance(value, dict):
            return None
        pairs = ((name, one(value[name])) for name, one in columns.items() if name in value)
        return {name: found for name, found in pairs if found is not None}

    return read


_PLAN = _only({
    "peak_bytes": number, "host_bytes": number, "bytes_of": _named(number), "num_layers": number, "num_parameters": number,
    "num_trained": number, "device": text, "peak_at": text,
})  # fmt: skip
_METRICS = _only({
    "step": number, "loss": number, "learning_rate": number, "grad_norm": number, "tokens": number, "step_seconds": number,
    "peak_bytes": number, "state_bytes": number, "active_layers": _list_of(number), "sampled_parts": _list_of(text),
    "scores": _named(number), "layers": text, "plan": _PLAN, "environment": _named(text),
    "run": _only({"steps": number}), "process": _only({"base_bytes": number}),
})  # fmt: skip
_SAMPLE = _only({"step": number, "prompt": text, "answer": text})


def metrics_row(line: bytes) -> dict[str, Any] | None:
    """A line of ``metrics.jsonl``; None if it is not one.

    Example:
        >>> metrics_row(b'{"step": 3, "loss": 1.23456789, "eval_math_loss": 2, "more": [1], "active_layers": [0, "x"]}')
        {'step': 3, 'loss': 1.23457, 'active_layers': [0], 'eval': {'math': 2}}
        >>> metrics_row(b"[1]"), metrics_row(b'{"step": "3"}'), metrics_row(b'{"step": 3')
        (None, None, None)
    """
    loaded = parsed(line)
    row = _METRICS(loaded)
    if row is None or "step" not in row:
        return None
    if losses := held_out(loaded):
        row["eval"] = losses
    return dict(row)


def held_out(loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Held-out losses by name; one without a name by the empty one.

    Example:
        >>> held_out({"eval_loss": 2.0}), held_out({"eval_loss": 2.0, "eval_math_loss": 2.0, "eval_web_loss": 3.0})
        ({'': 2.0}, {'math': 2.0, 'web': 3.0})
    """
    matches = ((re.fullmatch(r"eval_(\w+)_loss", name), number(value)) for name, value in loaded.items())
    named = {match[1]: value for match, value in matches if match and value is not None}
    first = number(loaded.get("eval_loss"))
    return named or ({} if first is None else {"": first})


def sample_row(line: bytes) -> dict[str, Any] | None:
    """A line of ``samples.jsonl``: a step, a prompt and what the model answers then; None if it is not one."""
    row = _SAMPLE(parsed(line))
    return dict(row) if row is not None and len(row) == 3 else None


def parsed(line: bytes | str) -> Any:
    """What a line of JSON says; None for anything else."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
