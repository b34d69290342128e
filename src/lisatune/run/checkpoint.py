"""Checkpoints on the disk: whole or absent, and no dearer than what changed since the one before."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from lisatune.common.files import CHECKPOINTS, sync
from lisatune.common.run_folder import checkpoint_steps
from lisatune.errors import UserError
from lisatune.placement.base import write_files
from lisatune.processes.collectives import barrier, gathered, rank, together
from lisatune.processes.shard_files import without_rank

MANIFEST, STATE = "manifest.json", "state.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")  # a file name in a checkpoint: no path, nothing hidden
MOST_JSON_BYTES = 2**28
Write = Callable[[Path, Mapping[str, Mapping[str, Tensor]]], list[Path]]


class Damaged(UserError):
    """A checkpoint is not what was written."""


class FileRecord(BaseModel):
    """What a file of a checkpoint must be."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """``manifest.json``: the files of a checkpoint, except itself."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: int = Field(ge=1, le=1)
    step: int = Field(ge=1)
    files: dict[str, FileRecord]


class Checkpoint(NamedTuple):
    """A whole one, every byte of it checked."""

    folder: Path
    manifest: Manifest
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, ``checkpoints/checkpoint-<step>`` in its folder.

    A checkpoint is a folder of safetensors files, ``state.json``, and ``manifest.json`` with the size and the SHA-256
    of each. It is written beside, flushed to the disk and then renamed, so that it is there whole or not at all. A file
    that has not changed since the checkpoint before is a second name (a hard link) for that one's; each folder is complete
    by itself, can be copied or removed, and only what changed costs time and room. Where the file system
    has no hard links, it is copied. The price: bytes that rot in a file are rotten in every checkpoint that shares it.

    Args:
        folder: Folder of the run.
        keep: How many are kept, at least 1; with 2 or more there is one to go back to if the newest is damaged.
        background: Write in a thread while training goes on; tensors given to ``save`` must not change then.
        write: Writes safetensors files into a folder and returns their paths, as ``write_files`` does.

    Of several processes each writes the shards that it holds, into a folder that all have to see, and rank 0 the rest: a file
    is then one for each process, ``<name>-rank<number>``.
    """

    def __init__(self, folder: Path, *, keep: int = 2, background: bool = False, write: Write = write_files) -> None:
        self.folder = folder / CHECKPOINTS
        self.keep = keep
        self.background = background
        self._run = folder
        self._write_files = write
        self._last: tuple[Path, Manifest] | None = None
        self._thread = ThreadPoolExecutor(1) if background else None
        self._writing: Future[None] | None = None
        if self.folder.is_symlink():
            raise UserError(f"{self.folder} is a link, which a run does not follow: put the folder itself there")

    def save(
        self, step: int, tensors: Mapping[str, dict[str, Tensor]], unchanged: set[str], state: dict[str, Any], *,
        best: int | None = None,
    ) -> None:  # fmt: skip
        """Write the checkpoint of ``step``, then remove all but the newest ``keep`` and that of step ``best``.

        Args:
            step: Optimizer steps that are done.
            tensors: File names without ``.safetensors`` to tensors on the CPU.
            unchanged: Names of files that are as in the checkpoint saved or read last.
            state: Anything that JSON can hold; floats are read back bit-identical.
            best: A step whose checkpoint stays.
        Raises: OSError if it cannot be written, from the next call if in the background; what was there before is
            untouched.
        """
        self.wait()
        if self._thread is None:
            self._save(step, tensors, unchanged, state, best)
        else:
            self._writing = self._thread.submit(self._save, step, tensors, unchanged, state, best)

    def wait(self) -> None:
        """Wait for what is being written, and raise what it raised."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def read(self, step: int) -> Checkpoint:
        """The checkpoint of ``step``; rank 0 looks, and tells the others.

        Raises: Damaged if it is not whole.
        Cost: all its bytes are read and hashed.
        """
        self.wait()
        with together():
            found = self._read(step) if rank() == 0 else None
        return cast("Checkpoint", gathered(found)[0])

    def damage(self, step: int) -> str | None:
        """What is wrong with the checkpoint of ``step``; None if it is whole. All processes get the same answer."""
        found = None
        if rank() == 0:
            try:
                self._read(step)
            except Damaged as error:
                found = str(error)
        return cast("str | None", gathered(found)[0])

    def latest(self, tell: Callable[[str], None]) -> Checkpoint | None:
        """The newest whole checkpoint, or None if there is none at all; rank 0 looks, and tells the others.

        Args:
            tell: Is told of each one that is damaged and passed over.
        Raises: Damaged if there are some, but none is whole.
        Cost: all its bytes are read and hashed.
        """
        with together():
            found = self._latest(tell) if rank() == 0 else None
        found = cast("Checkpoint | None", gathered(found)[0])
        self._last = None if found is None else (found.folder, found.manifest)
        return found

    def _latest(self, tell: Callable[[str], None]) -> Checkpoint | None:
        steps, damage = checkpoint_steps(self._run), None
        for step in steps:
            try:
                return self._read(step)
            except Damaged as error:
                damage = error
                tell(f"{error}; skipped")
        if damage is not None:
            raise Damaged(
                f"every checkpoint of {self._run} is damaged (the oldest: {damage}): train again with another output, or "
                "restore a checkpoint from a backup"
            )
        return None

    def _read(self, step: int) -> Checkpoint:
        folder = self.folder / f"checkpoint-{step}"
        found = Checkpoint(folder, manifest := read_manifest(folder), read_state(folder))
        if manifest.step != step:
            raise Damaged(f"{folder} is of step {manifest.step}")
        return found

    def known(self) -> set[str]:
        """Names of the files that ``unchanged`` may name."""
        files = {} if self._last is None else self._last[1].files
        return {without_rank(name.removesuffix(".safetensors")) for name in files}

    def _save(
        self, step: int, tensors: Mapping[str, dict[str, Tensor]], unchanged: set[str], state: dict[str, Any],
        best: int | None,
    ) -> None:  # fmt: skip
        new, target = self._make_folder(step), self.folder / f"checkpoint-{step}"
        try:
            # the tensors, by all processes
            files = self._write(new, tensors, unchanged)
            if rank() > 0:
                barrier()
                self._last = target, Manifest(format=1, step=step, files=files)
                return

            # the rest, by rank 0, and then the new folder in its place
            (new / STATE).write_text(json.dumps(state), encoding="utf-8")
            files[STATE] = _record(new / STATE)
            manifest = Manifest(format=1, step=step, files=files)
            (new / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
            sync(new / MANIFEST)
            sync(new)
            self._discard(target)  # a damaged one, which was passed over
            new.rename(target)
            sync(self.folder)
            barrier()
        except BaseException as error:
            shutil.rmtree(new, ignore_errors=True)
            if isinstance(error, SafetensorError) and (cause := re.search(r"os error (\d+)", str(error))):
                raise OSError(int(cause[1]), os.strerror(int(cause[1])), str(new)) from error
            raise
        self._last = target, manifest
        self._keep_newest(step, best)

    def _make_folder(self, step: int) -> Path:
        """The folder that the checkpoint of ``step`` is written in, until it is whole."""
        new = self.folder / f".writing-{step}"
        if rank() == 0:
            self.folder.mkdir(exist_ok=True)
            self._sweep()
            new.mkdir()
        barrier()
        if not new.is_dir():
            raise UserError(
                f"{self.folder} is not visible to all processes: choose an output in a folder that all hosts share"
            )
        return new

    def _keep_newest(self, step: int, best: int | None) -> None:
        """Remove all checkpoints but the newest ``keep`` up to ``step``, and that of step ``best``."""
        steps = checkpoint_steps(self._run)
        kept = [s for s in steps if s <= step][: self.keep]
        for other in steps:
            if other not in kept and other != best:  # older ones, and later ones that were passed over as damaged
                self._discard(self.folder / f"checkpoint-{other}")

    def _write(
        self, beside: Path, tensors: Mapping[str, dict[str, Tensor]], unchanged: set[str]
    ) -> dict[str, FileRecord]:
        """The files of tensors, of all processes."""
        files: dict[str, FileRecord] = {}
        if rank() == 0 and self._last is not None:
            names = [n for n in self._last[1].files if without_rank(n.removesuffix(".safetensors")) in unchanged]
            files = {name: self._link(name, beside) for name in sorted(names)}
        files |= {path.name: _record(path) for path in self._write_files(beside, tensors)}
        return {name: record for of_process in gathered(files) for name, record in of_process.items()}

    def _link(self, name: str, beside: Path) -> FileRecord:
        assert self._last is not None
        folder, manifest = self._last
        try:
            os.link(folder / name, beside / name, follow_symlinks=False)
        # os.link raises NotImplementedError on a platform that cannot link so; a file system may refuse, or have too many
        except (OSError, NotImplementedError):
            shutil.copyfile(folder / name, beside / name, follow_symlinks=False)
            sync(beside / name)
        return manifest.files[name]

    def _discard(self, folder: Path) -> None:
        if folder.is_symlink():
            folder.unlink()
        elif folder.exists():
            doomed = folder.with_name(f".removing-{folder.name}")  # so that no half of one is ever seen
            shutil.rmtree(doomed, ignore_errors=True)
            folder.rename(doomed)
            shutil.rmtree(doomed)

    def _sweep(self) -> None:
        """Remove what a process that was killed has left half done."""
        for left in [*self.folder.glob(".writing-*"), *self.folder.glob(".removing-*")]:
            if left.is_symlink() or not left.is_dir():
                left.unlink()
            else:
                shutil.rmtree(left)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint in ``folder``, after a look at every byte that it speaks of.

    Raises: Damaged naming the file, if anything is missing, cut off, changed, a link, or not where it should be.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise Damaged(f"{folder} is not a folder of its own")
    try:
        manifest = Manifest.model_validate(_read_json(folder, MANIFEST))
    except ValidationError as error:
        first = error.errors()[0]
        raise Damaged(
            f"{folder / MANIFEST}: {'.'.join(map(str, first['loc']))[:80]}: {first['msg'].lower()}"
        ) from error
    if STATE not in manifest.files:
        raise Damaged(f"{folder / MANIFEST}: names no {STATE}")
    for name, expected in manifest.files.items():
        if not NAME.fullmatch(name) or (name != STATE and not name.endswith(".safetensors")):
            raise Damaged(f"{folder / MANIFEST}: {name[:80]!r} is not the name of a checkpoint's file")
        path = folder / name
        _check_plain(path)
        size = path.stat().st_size
        if size != expected.bytes:
            raise Damaged(f"{path} has {size:,} bytes instead of {expected.bytes:,}")
        if _digest(path) != expected.sha256:
            raise Damaged(f"{path} is not what was written (its SHA-256 differs)")
    return manifest


def read_state(folder: Path) -> dict[str, Any]:
    """What ``save`` was given as ``state``.

    Raises: Damaged if it is no JSON object.
    """
    state = _read_json(folder, STATE)
    if not isinstance(state, dict):
        raise Damaged(f"{folder / STATE} holds no JSON object")
    return state


def _read_json(folder: Path, name: str) -> Any:
    path = folder / name
    _check_plain(path)
    if path.stat().st_size > MOST_JSON_BYTES:
        raise Damaged(f"{path} has {path.stat().st_size:,} bytes, more than any that was written")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise Damaged(f"{path} cannot be read ({type(error).__name__})") from error


def _check_plain(path: Path) -> None:
    try:
        plain, link = path.is_file(), path.is_symlink()
    except OSError as error:  # the folder may not be readable
        raise Damaged(f"{path} cannot be read ({error.strerror})") from error
    if link or not plain:
        raise Damaged(f"{path} is {'a link' if link else 'missing'}")


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error.strerror})") from error


def _record(path: Path) -> FileRecord:
    """What ``path`` holds, once that is on the disk."""
    sync(path)
    return FileRecord(bytes=path.stat().st_size, sha256=_digest(path))
