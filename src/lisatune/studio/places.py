"""The folders that a studio may use, and what is in them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lisatune.errors import UserError, shown

MOST_FOUND = 200
DEEPEST = 3
DATA_ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz")
RUNS_CODE = {"trust_remote_code": "code that a model brings along", "sampler": "code of a module"}


class Places:
    """Folders outside of which nothing is read and nothing written.

    Args:
        folders: The first is the one that runs are written into, in ``runs``. Names without a folder are looked up there.
    Raises: UserError if one is no folder.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = [folder.expanduser().resolve() for folder in folders]
        for folder in self.folders:
            if not folder.is_dir():
                raise UserError(f"{folder}: no such folder; make it, or name another one")
        self.home = self.folders[0]

    def check(self, settings: dict[str, Any]) -> None:
        """Refuse ``settings`` that name a file elsewhere, or that would run code of a model or a module.

        Raises: UserError naming the setting.
        """
        for name, what in RUNS_CODE.items():
            value = settings.get(name)
            if value is True or (isinstance(value, str) and ":" in value):
                raise UserError(f"the studio does not run {what}, so leave {name} out, or use lisatune train")
        for name, value in settings.items():
            for text in _texts(value):
                if name != "samples" and self._leads_out(text):
                    raise UserError(
                        f"{name}={shown(text)} is outside of the folders that this studio may use: restart lisatune studio with that folder too"
                    )

    def _leads_out(self, text: str) -> bool:
        """Whether ``text``, if it is a path, is one out of the folders; a hub name or a word would be one inside."""
        try:
            path = (self.home / Path(text).expanduser()).resolve()
            return not any(path.is_relative_to(folder) for folder in self.folders)
        except (OSError, ValueError, RuntimeError):  # longer than a path can be, or of a user who is not there
            return text.startswith(("/", "~"))

    def name(self, value: Any) -> str:
        """``value`` as the name of a new folder.

        Raises: UserError if it is none.
        """
        if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", value):
            raise UserError(f"name={shown(value)}: give it letters, digits, dots and dashes, up to 64")
        return value

    def found(self) -> dict[str, list[str]]:
        """Names of models and of files of rows in the folders, for a list to choose from."""
        models, data = list[str](), list[str]()
        for folder in self.folders:
            for path, files in _walk(folder):
                if {"config.json", "tokenizer_config.json"} <= set(files):
                    models.append(self._short(path))
                else:
                    models += [self._short(path / file) for file in files if file.endswith(".gguf")]
                    data += [self._short(path / file) for file in files if file.endswith(DATA_ENDINGS)]
        return {"models": models[:MOST_FOUND], "data": data[:MOST_FOUND]}

    def _short(self, path: Path) -> str:
        return str(path.relative_to(self.home) if path.is_relative_to(self.home) else path)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _texts(inner)


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    for path, folders, files in os.walk(folder):
        depth = len(Path(path).relative_to(folder).parts)
        # a run's folder has a model, and files that are no rows
        folders[:] = (
            [] if depth >= DEEPEST else sorted(name for name in folders if name[0] != "." and name != "checkpoints")
        )
        yield Path(path), [] if "metrics.jsonl" in files else sorted(files)
