"""Files of a run's folder: written whole or not at all, by one process at a time."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

CHECKPOINTS, LOCK = "checkpoints", "run.lock"


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # Windows, which cannot open a folder
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """Replace the text of ``path``; whoever reads it, also after a power cut, finds all of the old or all of the new.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.json"
        >>> write_whole(path, "{}")
        >>> path.read_text(), len(list(path.parent.iterdir()))
        ('{}', 1)
    """
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    with beside.open("x", encoding="utf-8") as file:  # not through a link that lies there
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync(path.parent)


def replace_folder(new: Path, folder: Path) -> None:
    """Put ``new`` in the place of ``folder``, once its files are on the disk; what was there is removed."""
    for path in [*new.rglob("*"), new]:
        sync(path)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        folder.rename(old)
    new.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
