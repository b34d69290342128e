"""Tools that a chat may call, from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lisatune.data.formats import Row, RowParser
from lisatune.errors import UserError


def read_tools(path: Path) -> list[dict[str, Any]]:
    """The functions of a JSON file, a list of them or an object with ``tools``, as chat templates take them.

    Raises: UserError if the file holds none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--tools {path}: cannot be read as JSON ({error}); give a list of functions") from error
    tools = found.get("tools", found) if isinstance(found, dict) else found
    row = {"prompt": "-", "completion": "-", "tools": tools}
    read = RowParser()(Row(str(path), row)).tools  # read in the same way as those of a row
    if not read:
        raise UserError(
            f"--tools {path}: holds no functions; give a list of them with name, description and parameters"
        )
    return [dict(tool) for tool in read]
