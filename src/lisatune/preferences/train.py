"""A whole run of a task of TRL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from lisatune.common.bars import training_bar
from lisatune.common.files import CHECKPOINTS
from lisatune.common.run_folder import how_to_resume
from lisatune.common.signals import stop_signals
from lisatune.data.examples import HeldOut, Rows
from lisatune.errors import Stopped
from lisatune.plan.ladder import explain_out_of_memory
from lisatune.preferences.build import TaskRun, build_task, quiet_trl
from lisatune.preferences.finish import finish
from lisatune.preferences.journal import Standing, TaskJournal
from lisatune.preferences.resume import go_on
from lisatune.processes.collectives import rank, together
from lisatune.run.hold import hold
from lisatune.run.metrics import Metrics
from lisatune.settings import TrainConfig, write_config


def train_task(
    config: TrainConfig, examples: tuple[Sequence[Rows], HeldOut], *, console: Console, resume: bool = False,
    allow_changes: bool = False, memory_bytes: int | None = None, host_bytes: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train as ``config`` says and leave the run's folder behind; arguments and errors as those of ``lisatune.train.train``."""
    run = build_task(config, *examples, console=console, memory_bytes=memory_bytes, host_bytes=host_bytes)
    with hold(run.folder, resume), stop_signals() as stop:
        with together():
            step, standing = go_on(run, console, allow_changes=allow_changes) if resume else (0, Standing())
        if rank() == 0:
            write_config(run.config, run.folder / "config.yaml")
        take_steps(run, TaskJournal(run, stop, standing), step, console)
        return finish(run, standing, console)


def take_steps(run: TaskRun, journal: TaskJournal, first_step: int, console: Console) -> None:
    """Take the steps that are left.

    Raises: Stopped after a checkpoint, if a signal came; UserError for a loss that is no number.
    """
    run.trainer.add_callback(journal)
    checkpoint = run.folder / CHECKPOINTS / f"checkpoint-{first_step}" if first_step else None
    device = run.device.type
    with (
        Metrics(run.config, run.folder, first_step) as metrics,
        training_bar(run.num_steps, console) as advance,
        explain_out_of_memory(run.config, run.layers.model.config, device, run.config.max_length),
        quiet_trl(),
    ):
        journal.begin(metrics, advance, first_step)
        try:
            run.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            journal.stop_counting()
    step = run.trainer.state.global_step
    if journal.signal and step < run.num_steps:
        raise Stopped(f"stopped after step {step:,} of {run.num_steps:,}; {how_to_resume(run.folder)}", journal.signal)
