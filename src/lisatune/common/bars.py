"""The progress of a run and of an evaluation: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

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

from lisatune.common.console import tell

LINE_SECONDS = 10  # between two plain lines: a day of training is then 8,640 lines


@dataclass(frozen=True)
class Step:
    """What is shown of an optimizer step.

    Args:
        number: Steps that are done, this one included.
        loss: Its loss.
        learning_rate: The rate at which it was taken.
        speed: Tokens per second.
        layers: The decoder layers that train; None if all do.
    """

    number: int
    loss: float
    learning_rate: float
    speed: float
    layers: Sequence[int] | None

    def layers_text(self) -> str:
        """The layers by number, or how many there are if they are many; empty if all train."""
        if self.layers is None:
            return ""
        return "layers " + (",".join(map(str, self.layers)) if len(self.layers) <= 8 else f"{len(self.layers)}")


Advance = Callable[[Step], None]


@contextmanager
def training_bar(num_steps: int, console: Console, *, clock: Callable[[], float] = time.monotonic) -> Iterator[Advance]:
    """Show each step: as a bar on a terminal, else as plain lines; call what it gives with a ``Step``.

    Args:
        num_steps: Steps of the whole run.
        console: Where it is shown.
        clock: Seconds, by which the plain lines are spaced and the time left is reckoned.
    """
    if not console.is_jupyter and (not console.is_terminal or console.is_dumb_terminal):
        yield _Lines(num_steps, console, clock).advance
        return
    columns = (
        TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[speed]:,.0f} tok/s"), TextColumn("{task.fields[layers]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("train", total=num_steps, loss=float("nan"), speed=0.0, layers="")

        def advance(step: Step) -> None:
            bar.update(task, completed=step.number, loss=step.loss, speed=step.speed, layers=step.layers_text())

        yield advance


class _Lines:
    """A line for the first step, for the last one, and every ``LINE_SECONDS`` between them."""

    def __init__(self, num_steps: int, console: Console, clock: Callable[[], float]) -> None:
        self._num_steps, self._console, self._clock = num_steps, console, clock
        self._first: tuple[int, float] | None = None  # the first step of this process, and when it was done

    def advance(self, step: Step) -> None:
        now = self._clock()
        if self._first is None:
            self._first, self._next = (step.number, now), now
        if now < self._next and step.number < self._num_steps:
            return
        self._next = now + LINE_SECONDS
        parts = [
            f"step {step.number:,}/{self._num_steps:,}", f"loss {step.loss:.4f}",
            f"learning rate {step.learning_rate:.3g}", f"{step.speed:,.0f} tokens/s", step.layers_text(),
        ]  # fmt: skip
        if (taken := step.number - self._first[0]) and step.number < self._num_steps:
            left = round((now - self._first[1]) / taken * (self._num_steps - step.number))
            parts.append(f"{timedelta(seconds=left)} left")
        tell(self._console, "  ".join(filter(None, parts)))


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
