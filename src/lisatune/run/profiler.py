"""A few steps under torch's profiler, with a label for each part of a step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from rich.console import Console
from torch.profiler import record_function, supported_activities

from lisatune.common.console import tell, warn
from lisatune.common.files import write_whole
from lisatune.errors import UserError
from lisatune.pages.terminal import Tables
from lisatune.processes.collectives import rank
from lisatune.run.build import Run
from lisatune.run.profile import FOLDER, TABLE, TRACE, head_of, note_of, read_profile, rows_of, summarize
from lisatune.run.progress import Progress

WARM_UP = 3  # steps: the first one makes optimizer state, one of the next counts tensors, and caches fill
LABELS = ("data", "forward", "loss", "backward", "optimizer", "waiting", "other")


class Clock:
    """Divides the time of steps among labels: each moment belongs to the innermost label that is open.

    On an NVIDIA GPU the device's time is divided at the same points, by events in its stream.

    Args:
        device: Where the model computes.
        now: The clock of this process, in seconds.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._on_gpu = device.type == "cuda"
        self._open: list[tuple[str, Any]] = []
        self._marks: list[tuple[str | None, float, Any]] = []  # from here on: label, time, event

    @property
    def running(self) -> bool:
        """Whether a label is open."""
        return bool(self._open)

    def begin(self, name: str) -> None:
        """Open a label, in the trace too."""
        named = record_function(name)
        named.__enter__()  # type: ignore[no-untyped-call]
        self._open.append((name, named))
        self._mark()

    def end(self) -> None:
        """Close the innermost label."""
        _, named = self._open.pop()
        named.__exit__(None, None, None)
        self._mark()

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        """A label for what is done inside."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def each(self, name: str, items: Iterable[Any]) -> Iterator[Any]:
        """``items``, with a label for the time that each takes to come."""
        items, missing = iter(items), object()
        while True:
            with self.label(name):
                item = next(items, missing)
            if item is missing:
                return
            yield item

    def milliseconds(self) -> dict[str, float]:
        """Time by label, on the clock of this process."""
        return self._by_label(lambda before, after: (after[1] - before[1]) * 1000)

    def gpu_milliseconds(self) -> dict[str, float]:
        """The same on the clock of the GPU; empty without one."""
        if not self._on_gpu:
            return {}
        torch.cuda.synchronize()
        return self._by_label(lambda before, after: before[2].elapsed_time(after[2]))

    def _by_label(self, between: Callable[[Any, Any], float]) -> dict[str, float]:
        found = dict.fromkeys(LABELS, 0.0)
        for before, after in zip(self._marks, self._marks[1:], strict=False):
            if before[0] is not None:
                found[before[0]] += between(before, after)
        return found

    def _mark(self) -> None:
        event = None
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
        self._marks.append((self._open[-1][0] if self._open else None, self._now(), event))


def profile(run: Run, progress: Progress, console: Console) -> None:
    """Let ``run`` profile the steps that ``profile_steps`` asks for, after the first ``WARM_UP`` that it takes from here on.

    Nothing is put on without the setting, and everything is taken off after these steps. Rank 0 alone profiles.

    Raises: UserError if the run has fewer steps.
    """
    wanted, left = run.config.profile_steps, run.data.num_steps - progress.step
    if wanted is None or (progress.step and read_profile(run.folder)):  # a resumed run has its profile already
        return
    if left < WARM_UP + wanted:
        needs = f"profile_steps={wanted} needs {WARM_UP + wanted:,} steps, of which the first {WARM_UP} warm up"
        if progress.step == 0:
            raise UserError(f"{needs}, and the run has {left:,}: lower it, or raise max_steps")
        warn(console, f"{needs}, and {left:,} are left: there will be no profile")
        return
    batches = run.batches

    def with_profile(progress: Progress) -> Iterator[Any]:
        steps = batches(progress)
        yield from islice(steps, WARM_UP)
        first, clock = progress.step + 1, Clock(run.device)
        kinds = supported_activities()  # type: ignore[no-untyped-call]
        with torch.profiler.profile(activities=kinds) as profiler, labelled(run, clock):
            yield from islice(clock.each("data", steps), wanted)
        if progress.step + 1 < first + wanted:
            warn(console, f"no profile: the run ended before its {wanted} steps were done")
            return
        folder = run.folder / FOLDER
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / TRACE))
        found = summarize(clock.milliseconds(), clock.gpu_milliseconds(), first=first, num_steps=wanted)
        write_whole(folder / TABLE, json.dumps(found, indent=2) + "\n")
        console.print(Tables(head_of(found), rows_of(found)))
        tell(console, note_of(found))
        yield from steps

    if rank() == 0:
        run.batches = with_profile  # type: ignore[method-assign]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def labelled(run: Run, clock: Clock) -> Iterator[None]:
    """Put ``clock`` on the points of a step, and take it off again."""
    learner, counted = run.learner, run.counted
    step, micro_batches, trunk = run.step, run.micro_batches, learner.layers.trunk_module

    def whole_step(*args: Any) -> Any:
        with clock.label("other"):
            outcome = step(*args)
            with clock.label("waiting"):
                _wait_for(run.device)
            return outcome

    def forward_begins(*_: Any) -> None:
        if clock.running:  # an evaluation between two steps is no part of them
            clock.begin("forward")

    def forward_ends(*_: Any) -> None:
        if clock.running:
            clock.end()

    with ExitStack() as stack:
        for hook in (trunk.register_forward_pre_hook(forward_begins), trunk.register_forward_hook(forward_ends)):
            stack.callback(hook.remove)
        stack.enter_context(replaced(run, "step", whole_step))
        stack.enter_context(replaced(run, "micro_batches", lambda batch: clock.each("data", micro_batches(batch))))
        # counting tensors would slow a step down
        stack.enter_context(replaced(run, "counted", max(counted, run.data.longest)))
        points = {
            "loss": "loss",
            "backward": "backward",
            "clip": "optimizer",
            "update": "optimizer",
            "is_bad": "waiting",
        }
        for name, label in points.items():
            stack.enter_context(replaced(learner, name, clock.label(label)(getattr(learner, name))))
        if run.config.optimizer_in_backward:
            update = learner.optimizer.update  # type: ignore[attr-defined]
            stack.enter_context(replaced(learner.optimizer, "update", clock.label("optimizer")(update)))
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner`` with another attribute for a while."""
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
