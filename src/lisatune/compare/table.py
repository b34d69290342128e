"""A comparison as tables and notes, for a terminal."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from lisatune.common.amounts import gib
from lisatune.compare.grid import short_text
from lisatune.pages.terminal import Tables


def show(result: Mapping[str, Any]) -> RenderableType:
    """The comparison as one table (or several, if a terminal is narrow), and what has to be known beside it."""
    return Group(Tables(*table_of(result)), *(Text(note) for note in notes_of(result)))


def table_of(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column names and cells, for the terminal and the page."""
    entries, equal = result["contenders"], result["equal"]
    done = [entry for entry in entries if entry["status"] == "finished"]

    # the columns that this comparison has
    names = [name for name in result["search"] if any(name in e["chosen"] for e in done)]
    unequal = len({round(entry["tokens"]) for entry in done}) > 1
    tasks = list(dict.fromkeys(task for entry in done for task in entry["scores"]))
    timed = equal["fastest"] and any(entry["equal_time"] for entry in done)
    head = [
        "",
        *(name.replace("_", " ") for name in names),
        "held-out loss",
        f"against {result['reference']}" if done else "against the first",
    ]
    head += [f"at {_mean(equal['tokens']):,.0f} tokens"] if unequal else []
    head += [f"at {_mean(equal['seconds']):,.3g} s"] if timed else []
    head += [*tasks, "peak", "predicted", "optimizer", "tokens/s", "s"]

    # a row for each contender
    rows = []
    for entry in entries:
        if entry["status"] != "finished":
            rows.append([entry["name"], entry["status"], *[""] * (len(head) - 2)])
            continue
        row = [entry["name"]]
        for name in names:
            edge = f" ({entry['edge'][name]})" if name in entry["edge"] else ""
            row.append(f"{short_text(entry['chosen'][name])}{edge}" if name in entry["chosen"] else "")
        row += [_pm(entry["eval_loss"]), "" if entry is done[0] else _difference(entry["difference"])]
        row += [_pm(entry["equal_tokens"])] if unequal else []
        row += [_pm(entry["equal_time"])] if timed else []
        row += [_pm(entry["scores"].get(task)) for task in tasks]
        planned = entry["planned_peak_bytes"]
        row += [gib(entry["peak_bytes"]), gib(planned) if planned else "", gib(entry["state_bytes"])]
        row += [
            f"{entry['tokens_per_second']:,.0f}",
            f"{entry['train_seconds']:,.{0 if entry['train_seconds'] >= 10 else 1}f}",
        ]
        rows.append(row)
    return head, rows


def notes_of(result: Mapping[str, Any]) -> list[str]:
    """What the table's numbers are, and what is the matter with them."""
    done = [entry for entry in result["contenders"] if entry["status"] == "finished"]
    notes = _notes_of_losses(result, done) if done else []
    for entry in done:
        notes += _notes_of_search(entry, ", ".join(result["search"]))
    for entry in result["contenders"]:
        notes += [f"{name} failed: {failure}" for name, failure in entry["failed"].items()]
    notes += _notes_of_equal_terms(result["equal"], done) if done else []
    left = sum(run["status"] == "unfinished" for run in result["runs"])
    if left:
        notes.append(f"{left} of {len(result['runs'])} runs are not finished.")
    return notes


def _notes_of_losses(result: Mapping[str, Any], done: Sequence[Mapping[str, Any]]) -> list[str]:
    seeds, searched = result["seeds"], ", ".join(result["search"])
    tuned = any(len(entry["by_search"]) > 1 for entry in done)
    if len(seeds) > 1:
        chosen = f"; for each seed {searched} was chosen by the others" if tuned else ""
        notes = [
            f"Loss: mean over {len(seeds)} seeds, ± 95% (Student's t){chosen}. A * marks a difference, seed by seed, whose interval "
            "excludes 0; one in twenty does so by chance."
        ]
    else:
        chosen = f", and {searched} was chosen by the loss that is shown, which flatters it" if tuned else ""
        notes = [f"One seed: no interval{chosen}."]
    if not tuned:
        notes.append(f"{searched} was not tuned, and methods want different values: give several.")
    return notes


def _notes_of_search(entry: Mapping[str, Any], searched: str) -> list[str]:
    """Values at an edge of the grid, and seeds that do not agree."""
    notes = [
        f"{entry['name']}: {name}={short_text(entry['chosen'][name])} is at the edge of the grid, the {edge} that was "
        "tried; the best may lie beyond. Add values, and finished runs are kept."
        for name, edge in entry["edge"].items()
    ]
    choices = list(dict.fromkeys(json.dumps(c) for c in entry["chosen_by_seed"].values()))
    if len(choices) > 1:
        shown = [" ".join(f"{n}={short_text(v)}" for n, v in json.loads(choice).items()) for choice in choices]
        notes.append(f"{entry['name']}: the seeds do not agree on {searched} ({' or '.join(shown)}).")
    return notes


def _notes_of_equal_terms(equal: Mapping[str, Any], done: Sequence[Mapping[str, Any]]) -> list[str]:
    """Losses at equal time and at equal memory."""
    notes = []
    if equal["fastest"] and len(done) > 1:
        if all(entry["equal_time"] for entry in done):
            notes.append(
                f"Equal time: the loss when {equal['fastest']} had ended; the others were in the middle of their schedule of "
                "learning rates, which is to their disadvantage unless it is constant."
            )
        else:
            notes.append("Equal time needs losses on the way: give eval_steps.")
    best = [f"{m}: {name or 'nothing fits'}" for m, name in equal["best_within_bytes"].items()]
    notes.append(f"Equal memory, best within {gib(equal['bytes'])}: {'; '.join(best)}.")
    return notes


def _mean(values: Mapping[Any, float]) -> float:
    return statistics.fmean(values.values()) if values else 0.0


def _pm(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    half = "" if value["high"] is None else f" ± {value['high'] - value['mean']:.4f}"
    return f"{value['mean']:.4f}{half}"


def _difference(value: Mapping[str, Any]) -> str:
    half = "" if value["high"] is None else f" ± {value['high'] - value['mean']:.4f}"
    return f"{value['mean']:+.4f}{half}{'*' if value['excludes_zero'] else ''}"
