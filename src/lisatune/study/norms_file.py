"""``norms.jsonl`` of a run: a JSON line for each step that was recorded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from lisatune.common.lines import drop_later_lines

NORMS = "norms.jsonl"


class NormsFile:
    """The file as it is written.

    Args:
        folder: Folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NORMS
        self._file: TextIO | None = None

    def go_back(self, num_steps: int) -> list[dict[str, Any]]:
        """Drop the lines of steps after ``num_steps``; returns those that stay."""
        return [json.loads(text) for text in drop_later_lines(self.path, num_steps, step_of=_step_of)]

    def open(self) -> None:
        """Open the file for more lines."""
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, parts: Mapping[str, Mapping[str, Any]]) -> None:
        """Append the line of ``step``."""
        assert self._file is not None, "open() comes first"
        self._file.write(json.dumps({"step": step, "parts": parts}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        assert self._file is not None, "open() comes first"
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._file is not None:
            self._file.close()


def _step_of(text: str) -> int | None:
    line = read_line(text)
    return None if line is None else line["step"]


def read_line(text: str) -> dict[str, Any] | None:
    """A line of ``norms.jsonl``; None if it is none, or half of one.

    Example:
        >>> read_line('{"step": 1, "parts": {"head": {"norm": 2.0, "change": 0.5, "updates": 1}}}')["step"]
        1
        >>> read_line('{"step": 1, "parts": {"head": {"norm": "two"}}}')
    """
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(line, dict) and _is_number(line.get("step")) and isinstance(line.get("parts"), dict)):
        return None
    whole = isinstance(line["step"], int) and line["step"] >= 0
    for values in line["parts"].values():
        whole = whole and isinstance(values, dict) and isinstance(values.get("updates"), int)
        whole = whole and all(_is_number(value) for key, value in values.items() if key != "matrices")
    return line if whole else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
