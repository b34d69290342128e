"""Where a step's time went: ``profile.json`` of a run, and its table. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER, TABLE, TRACE = "profile", "profile.json", "trace.json"


def summarize(
    milliseconds: Mapping[str, float], on_gpu: Mapping[str, float], *, first: int, num_steps: int
) -> dict[str, Any]:
    """What ``profile.json`` holds: means of a step, by label.

    Args:
        milliseconds: Time of all steps together, by label.
        on_gpu: The same on the clock of the GPU; empty without one.
        first: Number of the first step, from 1.
        num_steps: Steps that were profiled.
    """
    total = sum(milliseconds.values())
    found: dict[str, Any] = {
        "first_step": first, "steps": num_steps, "step_milliseconds": total / num_steps,
        "shares": {label: spent / total for label, spent in milliseconds.items()},
    }  # fmt: skip
    times = {"milliseconds": milliseconds, "gpu_milliseconds": on_gpu}
    means = {name: {label: spent / num_steps for label, spent in of.items()} for name, of in times.items() if of}
    return found | means


def read_profile(folder: Path) -> dict[str, Any] | None:
    """The profile of the run in ``folder``; None if it has none."""
    path = folder / FOLDER / TABLE
    found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found


def head_of(found: dict[str, Any]) -> list[str]:
    """Heading of the table of a profile."""
    return ["part of a step", "share", "ms"] + ["ms on the GPU"] * ("gpu_milliseconds" in found)


def rows_of(found: dict[str, Any]) -> list[list[str]]:
    """Rows of the table of a profile, the whole step last."""
    times = [found[name] for name in ("milliseconds", "gpu_milliseconds") if name in found]
    rows = [
        [label, f"{share:.1%}", *(f"{by_label[label]:,.2f}" for by_label in times)]
        for label, share in found["shares"].items()
    ]
    return [*rows, ["step", "100.0%", *(f"{sum(by_label.values()):,.2f}" for by_label in times)]]


def note_of(found: dict[str, Any]) -> str:
    """What the numbers are, in a line."""
    last = found["first_step"] + found["steps"] - 1
    return (
        f"means of steps {found['first_step']:,} to {last:,}, which the profiler slows down; {FOLDER}/{TRACE} opens in "
        "ui.perfetto.dev"
    )
