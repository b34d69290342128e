"""All that a run writes down while it trains: metrics, norms of the layers, the tracker, and the progress shown."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console

from lisatune.common.bars import Step, training_bar
from lisatune.common.console import tell
from lisatune.common.loss_names import named_losses
from lisatune.data.loader import Batch
from lisatune.engine import LisaEngine
from lisatune.learner import Outcome
from lisatune.memory.measure import state_bytes
from lisatune.processes.collectives import rank
from lisatune.run.build import Run, is_due
from lisatune.run.coverage import hint_at_unknown_text
from lisatune.run.metrics import Metrics
from lisatune.run.progress import Evaluation, Progress
from lisatune.run.samples import Samples
from lisatune.run.snapshot import environment
from lisatune.slices.engine import SliceEngine
from lisatune.study.recorder import NormRecorder


class Journal:
    """Writes down what each step led to, in one call.

    Make it before a checkpoint is put back: norms are measured against the weights that the run began with.

    Args:
        run: The run, before its first step.
        console: Where the progress is shown.
    """

    def __init__(self, run: Run, console: Console) -> None:
        self.run = run
        self._console = console
        self._recorder: NormRecorder | None = None
        self._samples: Samples | None = None
        if run.config.norm_steps and rank() == 0:
            self._recorder = NormRecorder(run.learner.layers, self.run.folder, source=run.config.model)
            console.print(self._recorder.describe(), highlight=False)

    @contextmanager
    def opened(self, progress: Progress) -> Iterator[None]:
        """Open all files where ``progress`` says; lines of later steps are dropped."""
        self._started, config = time.perf_counter() - progress.train_seconds, self.run.config
        with ExitStack() as stack:
            self._metrics = stack.enter_context(Metrics(config, self.run.folder, progress.step))
            self._advance = stack.enter_context(training_bar(self.run.data.num_steps, self._console))
            if config.samples and rank() == 0:
                self._samples = stack.enter_context(Samples(self.run, self._console, progress.step))
            if self._recorder:
                stack.enter_context(self._recorder).begin(progress.step, progress.trained_steps or None)
            yield

    def begin(self, evaluation: Evaluation) -> None:
        """The line of step 0: what the run consists of, and how good the model is before the first step."""
        self._metrics.write(
            step=0, **named_losses(evaluation.losses or {}), layers=self.run.learner.layers.describe(),
            plan=self.run.plan.as_dict(), environment=environment(self.run.device), scores=evaluation.scores,
            run={"steps": self.run.data.num_steps}, process={"base_bytes": self.run.meter.base_bytes},
        )  # fmt: skip
        if self._samples:
            self._samples.write(0)
        loss = next(iter((evaluation.losses or {}).values()), None)
        if hint := hint_at_unknown_text(self.run.config, self.run.learner.engine, loss):
            tell(self._console, hint)

    def write(
        self, step: int, batch: Batch, outcome: Outcome, evaluation: Evaluation, *, learning_rate: float,
        seconds: float, last: bool,
    ) -> None:  # fmt: skip
        """Write down a step.

        Args:
            step: Steps that are done, this one included.
            batch: What it learned from, on all processes.
            outcome: What ``Learner.step`` returned.
            evaluation: What was evaluated after it.
            learning_rate: The rate at which it was taken.
            seconds: How long it took.
            last: Whether no other step follows.
        """
        learner = self.run.learner
        loss, active = outcome.loss.item(), learner.engine.active if learner.engine else None
        evaluated = evaluation.losses is not None or bool(evaluation.scores)
        if evaluated or outcome.bad or is_due(self.run.config.logging_steps, step):
            self._metrics.write(
                step=step, loss=loss, **named_losses(evaluation.losses or {}), learning_rate=learning_rate,
                grad_norm=outcome.grad_norm.item(), skipped=outcome.bad or None, active_layers=active,
                sampled_parts=sampled_parts(learner.engine), tokens=batch.num_tokens,
                labelled_tokens=batch.num_labelled, step_seconds=seconds, peak_bytes=self.run.meter.bytes(),
                state_bytes=state_bytes(learner.optimizer), scores=evaluation.scores,
            )  # fmt: skip
        if self._samples and evaluated:
            self._samples.write(step)
        if self._recorder:
            self._recorder.count(() if outcome.bad else learner.trained_parts)
            if last or is_due(self.run.config.norm_steps, step):
                self._recorder.record(step, matrix_ranks=last)
        self._advance(Step(step, loss, learning_rate, batch.num_tokens / seconds, active))

    def settle(self, progress: Progress) -> None:
        """Bring ``progress`` up to date, and wait until all lines are on the disk: a checkpoint relies on them."""
        progress.train_seconds = time.perf_counter() - self._started
        progress.peak_bytes = max(progress.peak_bytes, self.run.meter.bytes())
        progress.tensor_peak_bytes = max(progress.tensor_peak_bytes, self.run.meter.tensor_bytes)
        self._metrics.sync()
        if self._samples:
            self._samples.sync()
        if self._recorder:
            self._recorder.sync()
            progress.trained_steps = dict(self._recorder.updates)


def sampled_parts(engine: LisaEngine | SliceEngine | None) -> list[str] | None:
    """The units sampled now that are not whole decoder layers: embedding, head, pieces of layers, slices."""
    if engine is None or engine.drawn is None or len(engine.pool) == len(engine.layers.decoder):
        return None
    return [engine.pool[i] for i in engine.drawn if not engine.pool[i].removeprefix("layers.").isdecimal()]
