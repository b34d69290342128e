"""Going on from a checkpoint of the Trainer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console

from lisatune.common.console import warn
from lisatune.common.files import CHECKPOINTS
from lisatune.common.run_folder import checkpoint_steps
from lisatune.errors import UserError
from lisatune.preferences.build import TaskRun
from lisatune.preferences.journal import Standing, TaskJournal
from lisatune.processes.collectives import gathered, rank
from lisatune.run.snapshot import environment
from lisatune.settings import differences, read_settings, used_settings


def go_on(run: TaskRun, console: Console, *, allow_changes: bool) -> tuple[int, Standing]:
    """The newest whole checkpoint by its step, and what it keeps; 0 if there is none. Later ones that are not whole are removed.

    Raises: UserError if settings or rows have changed and ``allow_changes`` is false, or there is nothing to go on from.
    """
    folder = run.folder
    step, standing = gathered(newest(folder, console) if rank() == 0 else None)[0]
    before = standing.config if step else _settings_before(folder) or used_settings(run.config)
    here = environment(run.device)
    elsewhere = [
        f"{name} was {was}, now it is {here.get(name)}"
        for name, was in standing.environment.items()
        if here.get(name) != was
    ]
    changes = differences(before, used_settings(run.config)) + [
        f"{name} data: {run.identity.get(name, 'none')} (was {was})"
        for name, was in standing.identity.items()
        if run.identity.get(name) != was
    ]
    changes += elsewhere if run.config.full_determinism else []
    if changes and not allow_changes:
        raise UserError(
            f"the run in {folder} began differently: {'; '.join(changes)}. Put back what has changed, or add --allow-changes "
            "to resume it with other results"
        )
    for change in changes:
        warn(console, f"changed since the run began: {change}")
    if not step:
        if (folder / "model").exists():
            raise UserError(f"{folder} holds a trained model, but no checkpoint to resume from: choose another output")
        console.print("no checkpoint was written yet: the run starts from the beginning")
        return 0, Standing()
    for change in [] if run.config.full_determinism else elsewhere:
        warn(console, f"{change}: bit-identical weights need the same")
    (folder / "summary.json").unlink(missing_ok=True)
    console.print(f"going on after step {step:,} of {run.num_steps:,}", highlight=False)
    return step, standing


def newest(folder: Path, console: Console) -> tuple[int, Standing]:
    """The newest checkpoint that is whole; the Trainer writes its state last, so without that it is not."""
    for step in checkpoint_steps(folder):
        path = folder / CHECKPOINTS / f"checkpoint-{step}"
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return step, Standing.model_validate(state["stateful_callbacks"][TaskJournal.__name__]["attributes"])
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            warn(console, f"{path} is damaged; skipped, and removed")
            shutil.rmtree(path, ignore_errors=True)
    return 0, Standing()


def _settings_before(folder: Path) -> dict[str, object]:
    path = folder / "config.yaml"
    return read_settings(str(path), []) if path.is_file() else {}
