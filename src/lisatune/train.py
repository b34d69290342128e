"""A whole training run: the loop, and all that is set up around it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lisatune.common.run_folder import finished, how_to_resume
from lisatune.common.signals import stop_signals
from lisatune.data.examples import HeldOut, Rows
from lisatune.errors import BadRowError, UserError
from lisatune.plan.ladder import explain_out_of_memory
from lisatune.processes.collectives import gathered, num_ranks, rank, together
from lisatune.processes.group import joined, restarted
from lisatune.run.bad_steps import skip_or_stop
from lisatune.run.best import settle_on_best
from lisatune.run.build import Run, build
from lisatune.run.finish import finish
from lisatune.run.hold import hold
from lisatune.run.journal import Journal
from lisatune.run.preflight import preflight
from lisatune.run.profiler import profile
from lisatune.run.progress import Evaluation, Progress
from lisatune.run.resume import go_on, with_date_of_before
from lisatune.run.saving import Saving
from lisatune.run.schedule import make_schedule, seed_step, set_learning_rate
from lisatune.settings import TrainConfig, check_num_ranks, write_config


def train(
    config: TrainConfig,
    *,
    console: Console | None = None,
    resume: bool = False,
    allow_changes: bool = False,
    memory_bytes: int | None = None,
    host_bytes: int | None = None,
    examples: tuple[Sequence[Rows], HeldOut] | None = None,
) -> dict[str, Any]:
    """Train as ``config`` says and leave the run's folder behind.

    Args:
        config: The settings.
        console: Where messages go; stderr by default.
        resume: Go on with the run in ``config.output``, if there is one, from its newest whole checkpoint.
            Weights and metrics are bit-identical to those of a run never stopped, wherever equal sums give equal bits; with
            ``full_determinism`` they do.
        allow_changes: Go on although settings or data are not those that the run began with.
        memory_bytes: If given, pull levers until the run fits into a device of that size.
        host_bytes: If given, leave out levers with which a process would take more host memory.
        examples: What ``preflight`` returned, if it was called already.
    Returns: The summary, also in ``summary.json``: losses before and after, seconds, tokens, peak and state bytes.
    Raises: UserError for whatever the user can mend; Stopped if SIGINT or SIGTERM came, after a checkpoint.
    """
    with joined():
        console = console or Console(stderr=True, quiet=rank() > 0)
        resume = resume or restarted()
        with together():
            summary = finished(Path(config.output)) if resume and not allow_changes else None
        summary = gathered(summary)[0]
        if summary is not None:
            console.print(f"{config.output}: the run is finished, nothing is left to do", highlight=False)
            return dict(summary)
        with together():
            check_num_ranks(config, num_ranks())
            examples = examples or preflight(config, resume=resume)
            config = with_date_of_before(config) if resume else config
        if config.task != "sft":
            from lisatune.preferences.train import train_task  # TRL's trainer takes the steps

            return train_task(
                config, examples, console=console, resume=resume, allow_changes=allow_changes, memory_bytes=memory_bytes,
                host_bytes=host_bytes,
            )  # fmt: skip
        run = build(config, *examples, console=console, memory_bytes=memory_bytes, host_bytes=host_bytes)
        return train_built(run, console=console, resume=resume, allow_changes=allow_changes)


def train_built(run: Run, *, console: Console, resume: bool = False, allow_changes: bool = False) -> dict[str, Any]:
    """Train ``run`` as ``train`` does, while no other process may use its folder."""
    config, folder = run.config, run.folder
    model_config, device = run.learner.layers.model.config, run.device.type
    try:
        with hold(folder, resume), stop_signals() as stop:
            saving, journal = Saving(run, stop), Journal(run, console)
            with together():
                progress = Progress()
                if resume:
                    progress = go_on(run, saving.snapshots, console, allow_changes=allow_changes)
            profile(run, progress, console)
            if rank() == 0:
                write_config(config, folder / "config.yaml")
            with explain_out_of_memory(config, model_config, device, run.data.longest):
                with journal.opened(progress):
                    try:
                        evaluation = loop(run, progress, journal, saving, console)
                    except BadRowError as error:
                        raise _saved_before(error, run, progress, journal, saving) from error
                evaluation = settle_on_best(run, progress, saving.snapshots, evaluation, console)
                return finish(run, progress, evaluation, console)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be written ({error.strerror or error}), so the run was stopped; "
            + how_to_resume(folder)
        ) from error


def _saved_before(error: UserError, run: Run, progress: Progress, journal: Journal, saving: Saving) -> UserError:
    """Save a checkpoint before a bad row of a stream stops the run; what is told then."""
    if progress.step == 0:
        return error
    journal.settle(progress)
    saving.save(progress)
    saving.wait()
    return UserError(
        f"{error}; stopped after step {progress.step:,} of {run.data.num_steps:,}, with a checkpoint. To leave bad rows out, "
        f"{how_to_resume(Path(run.config.output))} on_bad_row=skip; if you fix the row, add --allow-changes instead"
    )


def loop(run: Run, progress: Progress, journal: Journal, saving: Saving, console: Console) -> Evaluation:
    """Take the steps that are left.

    Returns: What was evaluated after the last of them; nothing if none was left.
    Raises: Stopped after a checkpoint, if a signal came; UserError for a bad step, if that stops the run.
    """
    config, learner, num_steps = run.config, run.learner, run.data.num_steps
    rate_at, evaluation = make_schedule(config, num_steps), Evaluation()

    # the model as it was
    if progress.step == 0:
        evaluation = run.evaluate(0)
        progress.note(evaluation)
        journal.begin(evaluation)

    learner.model.train()
    for step, batch, position in run.batches(progress):
        # one optimizer step: what is drawn at random in it depends on the seed and its number alone
        begun = time.perf_counter()
        seed_step(config.seed, step)
        set_learning_rate(learner.optimizer, rate := rate_at(step))
        outcome = run.step(step, batch)
        seconds = time.perf_counter() - begun

        # a bad step changed nothing: go on without it, or stop
        progress.advance(batch, position, bad=outcome.bad)
        if outcome.bad:
            skip_or_stop(run, progress, batch, outcome, console)

        # what the step led to
        evaluation = run.evaluate(step + 1)
        is_best = progress.is_best(evaluation, by_scores=run.scorer is not None)
        if last := run.is_over(progress):
            evaluation = run.completed(evaluation)
        progress.note(evaluation)
        journal.write(step + 1, batch, outcome, evaluation, learning_rate=rate, seconds=seconds, last=last)

        # a checkpoint, if one is due; a signal stops the run after it
        saving.between_steps(progress, journal, is_best=is_best, last=last)
    journal.settle(progress)
    saving.wait()
    return evaluation
