"""The folder of a run: whose it is, and how far it has come."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lisatune.common.files import CHECKPOINTS, LOCK
from lisatune.errors import UserError


def check_output(folder: Path, *, resume: bool = False, held: bool = False) -> None:
    """Refuse an output folder that holds anything, unless it is a run to go on with: nothing is overwritten.

    ``held`` says that this process holds it already (``only_run``).
    """
    try:
        _check_output(folder, resume, held)
    except OSError as error:
        raise UserError(f"output folder {folder} cannot be used ({error.strerror or error}): choose another") from error


def _check_output(folder: Path, resume: bool, held: bool) -> None:
    if folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
        link = next((path for path in folder.iterdir() if path.is_symlink()), None)
        if link is not None:
            raise UserError(
                f"{link} is a symbolic link, and a run does not write through links: put the file or folder itself there"
            )
        if not (folder / "config.yaml").is_file():
            raise UserError(
                f"output folder {folder} is not empty, and holds no run: choose another, or remove it first"
            )
        if not resume:
            raise UserError(f"output folder {folder} already holds {describe_run(folder)}, or choose another output")
        if not held:
            with only_run(folder):
                pass  # a run that is under way is told of at once
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file: choose a folder")
    parent = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"output folder {folder} cannot be made in {parent}: choose a place where you may write")


def describe_run(folder: Path) -> str:
    """What became of the run in ``folder``, and how to go on."""
    if (folder / "summary.json").is_file():
        return "a finished run: report on it with lisatune report"
    steps = checkpoint_steps(folder)
    stopped = (
        f"a run that was stopped after step {steps[0]:,} or later"
        if steps
        else "a run that was stopped before its first checkpoint"
    )
    return f"{stopped}: add --resume to resume it"


def how_to_resume(folder: Path) -> str:
    """What to type, for the end of a message."""
    return f"resume with: lisatune train --resume --config {folder / 'config.yaml'}"


def finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished run; None if there is no such run.

    Raises: UserError if it cannot be read.
    """
    path = folder / "summary.json"
    if not path.is_file():
        return None
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it to resume the run") from error
    return summary


@contextmanager
def only_run(folder: Path, *, doing: str = "trains") -> Iterator[None]:
    """Hold ``folder`` for this process; the system lets go of it when the process ends, however it ends.

    ``doing`` says what such a process does in it.

    Raises: UserError if another process holds it.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another process {doing} in {folder}: wait until it has ended, or choose another output"
        ) from None
    try:
        yield
    finally:
        lock.release()


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a run's ``folder`` by their names, the newest first; none of them is opened."""
    inside = folder / CHECKPOINTS
    names = [path.name for path in inside.iterdir()] if inside.is_dir() else []
    found = [re.fullmatch(r"checkpoint-(\d{1,18})", name) for name in names]
    return sorted((int(match[1]) for match in found if match), reverse=True)
