"""Lines of JSON that are appended as they come and outlive whatever stops the process. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lisatune.errors import UserError


def key_of(**parts: Any) -> str:
    """What a record is found by: a hash of all that its content depends on.

    Example:
        >>> key_of(model="m", turn=1) == key_of(turn=1, model="m") != key_of(model="m", turn=2)
        True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Records:
    """A file of JSON lines, each with its ``key``, that only grows; one process writes it, from any of its threads.

    A line is on the disk when ``add`` returns. A last line that a kill has torn is dropped; any other that cannot be read
    is an error, since what it held was paid for.

    Raises: UserError naming the file and line.
    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.jsonl"
        >>> Records(path).add("k", {"answer": "yes"})
        >>> Records(path).get("k")
        {'answer': 'yes'}
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        if path.is_symlink():
            raise UserError(
                f"{path} is a symbolic link, and nothing is written through links: put the file itself there"
            )
        try:
            self._found = self._read()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error}): choose another output") from error

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: str) -> Mapping[str, Any] | None:
        """The record of ``key``, or None."""
        return self._found.get(key)

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Write the record of ``key`` down, once."""
        line = json.dumps({"key": key, **record}).encode() + b"\n"  # ASCII, so that half a character is no error
        with self._lock:
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            self._found[key] = dict(record)

    def _read(self) -> dict[str, Mapping[str, Any]]:
        if not self.path.exists():
            return {}
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.truncate(self.path, len(whole))
        found = {}
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                found[record.pop("key")] = record
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(f"{self.path}, line {number}: not a record of this tool; remove that line") from error
        return found
