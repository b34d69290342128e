"""The progress bars of a run and of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[[int, float, float, Sequence[int] | None], None]


@contextmanager
def training_bar(num_steps: int, console: Console) -> Iterator[Advance]:
    """A bar with loss, tokens/s, the layers in training and the time left; call it with (step, loss, speed, layers)."""
    columns = (
        TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[speed]:,.0f} tok/s"), TextColumn("{task.fields[layers]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("train", total=num_steps, loss=float("nan"), speed=0.0, layers="")

        def advance(step: int, loss: float, speed: float, layers: Sequence[int] | None) -> None:
            text = (
                ""
                if layers is None
                else "layers " + (",".join(map(str, layers)) if len(layers) <= 8 else f"{len(layers)}")
            )
            bar.update(task, completed=step, loss=loss, speed=speed, layers=text)

        yield advance


@contextmanager
def scoring_bar(title: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar of the prompts scored and the time left; call it with (done, total). It goes when it is done."""
    columns = (
        TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(bar_width=24),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(escape(title), total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield advance


@dataclass(frozen=True)
class Counter:
    """A bar that counts, and may say why it does not."""

    bar: Progress
    task: TaskID

    def advance(self, num: int = 1) -> None:
        """``num`` more are done."""
        self.bar.update(self.task, advance=num, note="")

    def note(self, text: str) -> None:
        """Say ``text`` beside the bar until the next advance."""
        self.bar.update(self.task, note=text)


@contextmanager
def counting_bar(title: str, total: int, console: Console) -> Iterator[Counter]:
    """A bar over ``total`` things of a kind, with the time left."""
    columns = (
        TextColumn("{task.description}", markup=False), MofNCompleteColumn(), BarColumn(bar_width=24), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        yield Counter(bar, bar.add_task(title, total=total, note=""))
