"""Reading files that others may have made or may be writing: none outside a folder, no more than asked for, no half a line."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MARK_BYTES = 256  # before a place in a file, by which one sees that it is still the same file


def open_plain(path: Path) -> BinaryIO | None:
    """``path``, if it is a plain file and no link; None for anything else.

    A link could lead out of the folder, and a pipe would wait for ever.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if path.is_symlink():
            return None
        handle = os.open(path, flags)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        return None
    return os.fdopen(handle, "rb")


def read_text(path: Path, most_bytes: int) -> str | None:
    """The text of a plain file of at most ``most_bytes``; None if there is no such file."""
    file = open_plain(path)
    if file is None:
        return None
    with file:
        data = file.read(most_bytes + 1)
    return data.decode("utf-8", "replace") if len(data) <= most_bytes else None


def read_end(path: Path, most_bytes: int) -> str:
    """The last bytes of a plain file as text; empty if there is no such file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "log"
        >>> _ = path.write_bytes(b"first line, last line")
        >>> read_end(path, 9), read_end(path, 99), read_end(path / "gone", 9)
        ('last line', 'first line, last line', '')
    """
    file = open_plain(path)
    if file is None:
        return ""
    with file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - most_bytes))
        return file.read(most_bytes).decode("utf-8", "replace")


@dataclass(frozen=True)
class News:
    """What a file holds after a place in it.

    Attributes:
        lines: Whole lines, without their ends.
        place: Where the next ones begin, to ask with.
        anew: The place asked for is no longer in the file: what was read before is void, and these are the first lines.
        more: There are further lines already.
    """

    lines: list[bytes]
    place: str
    anew: bool = False
    more: bool = False


def news_of(path: Path, place: str, most_bytes: int) -> News:
    """The lines of ``path`` after ``place``, at most ``most_bytes`` of them; a line that is longer is left out.

    A place is an offset with a hash of the bytes before it. A run that is resumed takes back the lines of steps that it
    takes again, and then the hash, or the length, no longer fits.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "lines"
        >>> _ = path.write_bytes(b"one\\ntwo\\nthr")
        >>> first = news_of(path, "", 1000)
        >>> first.lines, first.anew
        ([b'one', b'two'], False)
        >>> _ = path.write_bytes(b"one\\ntwo\\nthree\\n")
        >>> news_of(path, first.place, 1000).lines
        [b'three']
        >>> _ = path.write_bytes(b"one\\nzwo\\n")
        >>> news = news_of(path, first.place, 1000)
        >>> news.lines, news.anew
        ([b'one', b'zwo'], True)
    """
    match = re.fullmatch(r"(\d{1,15})-([0-9a-f]{8})", place)
    offset = int(match[1]) if match else 0
    file = open_plain(path)
    if file is None:
        return News([], "", anew=offset > 0)
    with file:
        anew = match is not None and _mark(file, offset) != match[2]
        offset = 0 if anew else offset
        file.seek(offset)
        data = file.read(most_bytes)
        end = data.rfind(b"\n") + 1 or (len(data) if len(data) == most_bytes else 0)
        lines = data[:end].split(b"\n")[:-1]
        return News(lines, f"{offset + end}-{_mark(file, offset + end)}", anew, more=len(data) == most_bytes)


def _mark(file: BinaryIO, offset: int) -> str:
    """A hash of the bytes before ``offset``; another one for a file that is shorter."""
    begin = max(0, offset - MARK_BYTES)
    try:
        file.seek(begin)
    except OSError:  # further than any file goes
        return ""
    found = file.read(offset - begin)
    return hashlib.blake2s(found, digest_size=4).hexdigest() if len(found) == offset - begin else ""
