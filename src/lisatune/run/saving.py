"""When a run saves a checkpoint, and when it stops."""

from __future__ import annotations

import math
import time

from lisatune.common.run_folder import how_to_resume
from lisatune.common.signals import StopSignal
from lisatune.errors import Stopped
from lisatune.processes.collectives import most, rank
from lisatune.run.build import Run, is_due
from lisatune.run.checkpoint import Checkpoints
from lisatune.run.journal import Journal
from lisatune.run.progress import Progress
from lisatune.run.snapshot import Snapshots
from lisatune.settings import TrainConfig, used_settings


class Saving:
    """The checkpoints of a run: when one is due, and what goes into it.

    Args:
        run: The run, before its first step.
        stop: The signals that ask this process to stop.
    """

    def __init__(self, run: Run, stop: StopSignal) -> None:
        config = run.config
        placement = run.learner.placement
        checkpoints = Checkpoints(
            run.folder, keep=config.save_total_limit, background=placement.can_write_behind, write=placement.write
        )
        self.snapshots = Snapshots(
            run.learner, checkpoints, used_settings(config), run.data.identity, keep_best=config.keep_best
        )
        self._run, self._keep_best = run, config.keep_best
        self._times = SaveTimes(config)
        self._stop = stop

    def between_steps(self, progress: Progress, journal: Journal, *, is_best: bool, last: bool) -> None:
        """Save a checkpoint after a step if one is due, if the model is the best so far, or if a signal stops the run.

        After the last step the trained model itself is saved, so that a checkpoint is needed only beside a better model.

        Raises: Stopped once the checkpoint is on the disk, if a signal came.
        """
        signal, due = self._asked(progress.step)
        if last:
            signal, due = 0, False
        if signal or due or (self._keep_best and (is_best or last)):
            journal.settle(progress)
            self.save(progress)
        if signal:
            self.wait()
            steps = f"{progress.step:,} of {self._run.data.num_steps:,}"
            raise Stopped(f"stopped after step {steps}; {how_to_resume(self._run.folder)}", signal)

    def _asked(self, step: int) -> tuple[int, bool]:
        """The signal that asks the run to stop after ``step`` steps (0: none), and whether a checkpoint is due.

        All processes get the same answer: a signal to one of them stops all, and the clock is rank 0's.
        """
        signal, due = most(self._stop.received, rank() == 0 and self._times.due(step))
        return signal, bool(due)

    def save(self, progress: Progress) -> None:
        """Save a checkpoint of the run as it is between two steps; on a GPU it is written while training goes on."""
        self.snapshots.save(progress)

    def wait(self) -> None:
        """Wait until the newest checkpoint is on the disk."""
        self.snapshots.checkpoints.wait()


class SaveTimes:
    """Says when a checkpoint is due."""

    def __init__(self, config: TrainConfig) -> None:
        self.steps = config.save_steps
        minutes = config.save_minutes or (None if config.save_steps else 10)
        self.seconds = math.inf if minutes is None else 60 * minutes
        self.last = time.monotonic()

    def due(self, num_steps: int) -> bool:
        """Whether one is due after ``num_steps`` steps; the clock starts again if so."""
        now = time.monotonic()
        if now - self.last < self.seconds and not is_due(self.steps, num_steps):
            return False
        self.last = now
        return True
