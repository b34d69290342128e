"""Scores before and after training, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from lisatune.evaluation.tasks.before_after import Scored


def show(found: Sequence[Scored]) -> RenderableType:
    """A table for each run or model, a row for each task, ± one standard error; and what the numbers are."""
    runs = any(scored.before is not None for scored in found)
    notes = ["n: documents; ±: one standard error" + (", of a difference document by document" if runs else "")]
    for task, score in {task: score for scored in found for task, score in scored.after.items()}.items():
        notes.append(f"{task}: {score.metric}, {score.num_fewshot} examples before each question")
    shown = [part for scored in found for part in (Text(scored.target.name), _table(scored))]
    return Group(*shown, *(Text(note, style="dim") for note in notes))


def _table(scored: Scored) -> Table:
    from lisatune.evaluation.tasks.score import difference

    table = Table()
    table.add_column("task", overflow="fold")
    for name in ["n", "score"] if scored.before is None else ["n", "before", "after", "difference"]:
        table.add_column(name, justify="right", no_wrap=True)
    for task, after in scored.after.items():
        cells = [task, f"{after.num_documents:,}", with_error(after.value, after.stderr)]
        if scored.before is not None:
            before, change = scored.before[task], difference(scored.before[task], after)
            cells.insert(2, with_error(before.value, before.stderr))
            cells.append(with_error(change["value"], change["stderr"], signed=True))
        table.add_row(*(Text(cell) for cell in cells))
    return table


def with_error(value: float, stderr: float | None, *, signed: bool = False) -> str:
    """``0.254 ± 0.045``.

    Example:
        >>> with_error(0.2544, 0.0449), with_error(0.01, None, signed=True)
        ('0.254 ± 0.045', '+0.010')
    """
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text if stderr is None else f"{text} ± {stderr:.3f}"
