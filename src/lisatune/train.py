"""A whole training run: the loop, and what it leaves behind."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lisatune.common.files import write_whole
from lisatune.common.loss_names import named_losses
from lisatune.common.progress import training_progress
from lisatune.common.run_folder import check_output, finished, only_run
from lisatune.common.signals import StopSignal, stop_signals
from lisatune.data.examples import HeldOut
from lisatune.data.formats import Example
from lisatune.data.loader import Batch
from lisatune.engine import LisaEngine
from lisatune.errors import Stopped, UserError
from lisatune.learner import Outcome
from lisatune.memory.measure import state_bytes
from lisatune.plan.ladder import explain_out_of_memory
from lisatune.processes.collectives import barrier, gathered, most, num_ranks, rank, together
from lisatune.processes.group import joined, restarted
from lisatune.run.build import Run, build
from lisatune.run.checkpoint import Checkpoints
from lisatune.run.metrics import Metrics
from lisatune.run.preflight import preflight
from lisatune.run.saving import SaveTimes, save_trained
from lisatune.run.schedule import set_learning_rate
from lisatune.run.snapshot import Snapshots, Standing, environment, read_state_of
from lisatune.settings import (
    TrainConfig,
    check_num_ranks,
    differences,
    read_settings,
    used_settings,
    write_config,
)
from lisatune.slices.engine import SliceEngine
from lisatune.study.recorder import NormRecorder

MOST_SKIPPED_IN_A_ROW = 10


def train(
    config: TrainConfig,
    *,
    console: Console | None = None,
    resume: bool = False,
    allow_changes: bool = False,
    memory_bytes: int | None = None,
    examples: tuple[Iterable[Example], HeldOut] | None = None,
) -> dict[str, Any]:
    """Train as ``config`` says and leave the run's folder behind.

    Args:
        config: The settings.
        console: Where to tell how it goes; stderr by default.
        resume: Go on with the run in ``config.output``, if there is one, from its newest whole checkpoint: on a CPU
            the weights and metrics become those of a run never stopped, to the bit; on a GPU ``full_determinism`` is for that.
        allow_changes: Go on although settings or data are not those that the run began with.
        memory_bytes: If given, pull levers until the run fits into a device of that size.
        examples: What ``preflight`` gave, if it was called already.
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
        run = build(config, *examples, console=console, memory_bytes=memory_bytes)
        return fit(run, console=console, resume=resume, allow_changes=allow_changes)


def fit(run: Run, *, console: Console, resume: bool = False, allow_changes: bool = False) -> dict[str, Any]:
    """Train ``run``, as ``train`` does; the folder is held against other processes."""
    config, folder = run.config, Path(run.config.output)
    try:
        with _hold(folder, resume), stop_signals() as stop:
            checkpoints = Checkpoints(
                folder, keep=config.save_total_limit, background=run.device.type == "cuda" and num_ranks() == 1
            )
            snapshots = Snapshots(run.learner, checkpoints, used_settings(config), run.data.identity)
            recorder = None
            if config.norm_steps:  # before a checkpoint is put back: weights are those of step 0
                recorder = NormRecorder(run.learner.layers, folder, source=config.model)
                console.print(recorder.describe(), highlight=False)
            with together():
                standing = _go_on(run, snapshots, console, allow_changes) if resume else Standing()
            if rank() == 0:
                write_config(config, folder / "config.yaml")
            model_config = run.learner.layers.model.config
            with explain_out_of_memory(config, model_config, run.device.type, run.data.longest):
                return _loop(run, standing, snapshots, stop, console, recorder)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be written ({error.strerror or error}), so the run was stopped; "
            + how_to_go_on(config)
        ) from error


@contextmanager
def _hold(folder: Path, resume: bool) -> Iterator[None]:
    """Make the run's folder and keep other runs out of it, by rank 0, while the others wait."""
    with ExitStack() as stack:
        with together():
            if rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(only_run(folder))
                check_output(folder, resume=resume, held=True)
        yield


def _loop(
    run: Run,
    standing: Standing,
    snapshots: Snapshots,
    stop: StopSignal,
    console: Console,
    recorder: NormRecorder | None,
) -> dict[str, Any]:
    """One optimizer step: one draw at most, one divisor for all its micro-batches, one update."""
    config, learner, num_steps = run.config, run.learner, run.data.num_steps
    folder, saves = Path(config.output), SaveTimes(config)
    started = time.perf_counter() - standing.train_seconds
    with (
        Metrics(config, folder, standing.step) as metrics,
        training_progress(num_steps, console) as progress,
        ExitStack() as stack,
    ):
        if recorder:
            stack.enter_context(recorder).begin(standing.step, standing.trained_steps or None)
        if standing.step == 0:
            standing.eval_before = standing.eval_after = run.held_out_losses()
            metrics.write(
                step=0, **named_losses(standing.eval_before), layers=learner.layers.describe(), plan=run.plan.as_dict(),
                scores=run.task_scores(),
            )  # fmt: skip
        learner.model.train()
        scores = None
        batches = run.data.loader.batches(standing.position)
        for step, (batch, position) in zip(range(standing.step, num_steps), batches, strict=False):
            tick = time.perf_counter()
            seed_step(config.seed, step)
            share = batch.share(rank(), num_ranks()) if num_ranks() > 1 else batch
            learning_rate = set_learning_rate(learner.optimizer, config, step, num_steps)
            micro_batches = (micro.to(run.device) for micro in share.split(config.per_device_train_batch_size))
            outcome = learner.step(step, micro_batches, batch.num_labelled)
            loss, grad_norm = outcome.loss.item(), outcome.norm.item()
            seconds = time.perf_counter() - tick
            standing.step, standing.position = step + 1, position
            standing.tokens += batch.num_tokens
            if outcome.bad:
                with together():
                    _bad_step(config, standing, batch, outcome, console)
            else:
                standing.skipped_in_a_row = 0
            active = learner.engine.active if learner.engine else None
            last = step + 1 == num_steps
            evaluated = last or bool(config.eval_steps and (step + 1) % config.eval_steps == 0)
            if evaluated:
                standing.eval_after = run.held_out_losses()
            scored = last or bool(config.eval_every and (step + 1) % config.eval_every == 0)
            scores = run.task_scores() if scored else None
            if evaluated or scores or outcome.bad or (step + 1) % config.logging_steps == 0:
                metrics.write(
                    step=step + 1, loss=loss, **named_losses(standing.eval_after if evaluated else {}),
                    learning_rate=learning_rate, grad_norm=grad_norm, skipped=outcome.bad or None, active_layers=active,
                    sampled_parts=_sampled_parts(learner.engine), tokens=batch.num_tokens,
                    labelled_tokens=batch.num_labelled, step_seconds=seconds, peak_bytes=run.meter.bytes(),
                    state_bytes=state_bytes(learner.optimizer), scores=scores,
                )  # fmt: skip
            if recorder:
                recorder.count(() if outcome.bad else learner.trained_parts)
                if last or (step + 1) % (config.norm_steps or 1) == 0:
                    recorder.record(step + 1, ranks=last)
            progress(step + 1, loss, batch.num_tokens / seconds, active)
            # a signal that one process was sent stops all after this step; rank 0 has the watch
            signal, save = most(stop.received, rank() == 0 and saves.due(step + 1))
            if not last and (signal or save):
                standing.train_seconds = time.perf_counter() - started
                standing.peak_bytes = max(standing.peak_bytes, run.meter.bytes())
                metrics.sync()
                if recorder:
                    recorder.sync()
                    standing.trained_steps = dict(recorder.updates)
                snapshots.save(standing)
            if not last and signal:
                snapshots.checkpoints.wait()
                raise Stopped(f"stopped after step {step + 1:,} of {num_steps:,}; {how_to_go_on(config)}", signal)
    snapshots.checkpoints.wait()
    summary: dict[str, Any] = {
        "method": config.method, "steps": num_steps, "tokens": standing.tokens,
        **{f"{name}_before": loss for name, loss in named_losses(standing.eval_before).items()},
        **{f"{name}_after": loss for name, loss in named_losses(standing.eval_after).items()},
        "train_seconds": time.perf_counter() - started, "planned_peak_bytes": run.plan.peak_bytes,
        "peak_bytes": max(standing.peak_bytes, run.meter.bytes()), "base_bytes": run.meter.base_bytes,
        "state_bytes": state_bytes(learner.optimizer), "skipped_steps": standing.skipped_steps,
    }  # fmt: skip
    summary |= {"scores": scores} if scores else {}
    if run.data.streamed:
        console.print(f"train: {run.data.streamed.describe()}", highlight=False)
    save_trained(run, folder)
    if rank() == 0:
        write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        _report(folder, console)
    barrier()
    return summary


def how_to_go_on(config: TrainConfig) -> str:
    """What to type, for the end of a message."""
    folder = Path(config.output)
    return f"go on with: lisatune train --resume --config {folder / 'config.yaml'}"


def seed_step(seed: int, step: int) -> None:
    """Seed what a step draws at random (dropout), so that it depends on the seed and the step alone."""
    name = f"{seed}/{step}" + (f"/{rank()}" if rank() else "")  # rows of other processes are dropped out otherwise
    number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    random.seed(number)
    torch.manual_seed(number)


def _go_on(run: Run, snapshots: Snapshots, console: Console, allow_changes: bool) -> Standing:
    """Put the run where its newest whole checkpoint says."""
    config, folder = run.config, Path(run.config.output)

    def tell(text: str) -> None:
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    found = snapshots.checkpoints.latest(tell)
    if found is not None:
        state = read_state_of(found)
        before, identity = state.config, state.identity
    else:
        path = folder / "config.yaml"
        before, identity = read_settings(str(path), []) if path.is_file() else used_settings(config), {}
    changes = differences(before, used_settings(config))
    changes += [
        f"{name} data: {run.data.identity.get(name, 'none')} (was {was})"
        for name, was in identity.items()
        if run.data.identity.get(name) != was
    ]
    if changes and not allow_changes:
        raise UserError(
            f"{folder} did not begin like this: {'; '.join(changes)}. Put back what has changed, or add --allow-changes "
            "to go on with it, to other results"
        )
    for change in changes:
        tell(f"changed since the run began: {change}")
    if found is None:
        if (folder / "model").exists():
            raise UserError(f"{folder} holds a trained model, but no checkpoint to go on from: choose another output")
        console.print("no checkpoint was written yet: the run begins anew")
        return Standing()
    for name, was in state.environment.items():
        now = environment(run.device).get(name)
        if now != was:
            tell(f"{name} was {was}, now it is {now}: weights equal to the bit need the same")
    (folder / "summary.json").unlink(missing_ok=True)
    standing = snapshots.restore(found)
    console.print(f"going on after step {standing.step:,} of {run.data.num_steps:,}", highlight=False)
    return standing


def _bad_step(config: TrainConfig, standing: Standing, batch: Batch, outcome: Outcome, console: Console) -> None:
    """Stop, or count a step that was left out."""
    shown = "; ".join(batch.places[:3]) + (f" and {len(batch.places) - 3} more" if len(batch.places) > 3 else "")
    limit = f" (bad_grad_norm={config.bad_grad_norm})" if config.bad_grad_norm else ""
    text = (
        f"step {standing.step}: the loss is {outcome.loss.item():.6g} and the gradient norm {outcome.norm.item():.6g}{limit} "
        f"with the rows {shown}"
    )
    standing.skipped_steps += 1
    standing.skipped_in_a_row += 1
    if config.on_bad_step == "skip" and standing.skipped_in_a_row < MOST_SKIPPED_IN_A_ROW:
        console.print(f"{text}: left out", style="yellow", markup=False, highlight=False, soft_wrap=True)
        return
    again = f" for the {MOST_SKIPPED_IN_A_ROW}th time in a row" if config.on_bad_step == "skip" else ""
    raise UserError(
        f"{text}{again}, so the run was stopped, with its last checkpoint as it was; try a lower learning_rate, warmup_steps or "
        f"on_bad_step=skip; {how_to_go_on(config)} --allow-changes, with the settings that change"
    )


def _sampled_parts(engine: LisaEngine | SliceEngine | None) -> list[str] | None:
    """What was drawn beside whole decoder layers: embedding, head, pieces of layers."""
    if engine is None or engine.drawn is None or len(engine.pool) == len(engine.layers.decoder):
        return None
    return [engine.pool[i] for i in engine.drawn if not engine.pool[i].removeprefix("layers.").isdecimal()]


def _report(folder: Path, console: Console) -> None:
    try:
        from lisatune.run.report import write_report
    except ImportError:
        console.print(
            "no report.html, which needs matplotlib: pip install 'lisatune[report]', then lisatune report RUN"
        )
        return
    write_report(folder)
