"""Putting a run back where its newest whole checkpoint says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lisatune.common.console import warn
from lisatune.errors import UserError
from lisatune.run.best import check_best
from lisatune.run.build import Run
from lisatune.run.progress import Progress
from lisatune.run.snapshot import Snapshots, State, environment, read_state_of
from lisatune.settings import TrainConfig, differences, read_settings, used_settings


def go_on(run: Run, snapshots: Snapshots, console: Console, *, allow_changes: bool) -> Progress:
    """Restore the newest whole checkpoint of ``run``; without one the run begins at step 0.

    Another processor or version is reported, and with ``full_determinism`` counts as a change.

    Raises: UserError if settings or data have changed and ``allow_changes`` is false, or there is nothing to go on from.
    """
    folder = run.folder
    checkpoint = snapshots.checkpoints.latest(lambda text: warn(console, text))
    state = None if checkpoint is None else read_state_of(checkpoint)

    # what has changed since the run began
    elsewhere = _elsewhere(state, run.device)
    changes = _changes(run, state) + (elsewhere if run.config.full_determinism else [])
    if changes and not allow_changes:
        raise UserError(
            f"the run in {folder} began differently: {'; '.join(changes)}. Put back what has changed, or add --allow-changes "
            "to resume it with other results"
        )
    for change in changes:
        warn(console, f"changed since the run began: {change}")

    # nothing was saved yet
    if checkpoint is None or state is None:
        if (folder / "model").exists() or (folder / "adapter").exists():
            raise UserError(f"{folder} holds a trained model, but no checkpoint to resume from: choose another output")
        console.print("no checkpoint was written yet: the run starts from the beginning")
        return Progress()

    # from the checkpoint on; a finished run that goes on is finished no more
    for change in [] if run.config.full_determinism else elsewhere:
        warn(console, f"{change}: bit-identical weights need the same")
    (folder / "summary.json").unlink(missing_ok=True)
    progress = snapshots.restore(checkpoint)
    check_best(run, progress, state, snapshots, console, allow_changes=allow_changes)
    console.print(f"going on after step {progress.step:,} of {run.data.num_steps:,}", highlight=False)
    return progress


def with_date_of_before(config: TrainConfig) -> TrainConfig:
    """``config`` with the day that the chat template of the run to resume has written, if it wrote one."""
    path = Path(config.output) / "config.yaml"
    if config.template_date is not None or not path.is_file():
        return config
    day = read_settings(str(path), []).get("template_date")
    return config.model_copy(update={"template_date": day}) if isinstance(day, str) else config


def _changes(run: Run, state: State | None) -> list[str]:
    """Settings and data that are not those that the run began with, in words."""
    before = _settings_before(run) if state is None else state.config
    identity = {} if state is None else state.identity
    return differences(before, used_settings(run.config)) + [
        f"{name} data: {run.data.identity.get(name, 'none')} (was {was})"
        for name, was in identity.items()
        if run.data.identity.get(name) != was
    ]


def _settings_before(run: Run) -> dict[str, Any]:
    """The settings that a run without a checkpoint began with."""
    path = run.folder / "config.yaml"
    return read_settings(str(path), []) if path.is_file() else used_settings(run.config)


def _elsewhere(state: State | None, device: torch.device) -> list[str]:
    """Versions, processors and devices that were others when the checkpoint was saved, in words."""
    before, here = {} if state is None else state.environment, environment(device)
    return [f"{name} was {was}, now it is {here.get(name)}" for name, was in before.items() if here.get(name) != was]
