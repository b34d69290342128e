"""Files of JSON lines, one a step, of a run that may be resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from lisatune.common.files import write_whole


def drop_later_lines(path: Path, num_steps: int, *, step_of: Callable[[str], int | None]) -> list[str]:
    """Remove the lines of steps after ``num_steps`` from ``path``; a resumed run takes these steps again.

    Args:
        path: The file; it need not be there.
        num_steps: Steps that are done. With 0 all lines go, that of step 0 too: the run begins again.
        step_of: The step of a line; None for a line that cannot be read, such as half of one, which goes too.
    Returns: The lines that stay, without their ends.
    """
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        step = step_of(line)
        if num_steps and step is not None and step <= num_steps:
            kept.append(line)
    write_whole(path, "".join(line + "\n" for line in kept))
    return kept


def step_of(text: str) -> int | None:
    """The ``step`` of a line of JSON; None if it has none.

    Example:
        >>> step_of('{"step": 3}'), step_of('{"st')
        (3, None)
    """
    try:
        step = json.loads(text)["step"]
    except (ValueError, TypeError, KeyError):
        return None
    return step if isinstance(step, int) else None
