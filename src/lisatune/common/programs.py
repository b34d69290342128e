"""Where the commands of other projects are."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def program(name: str, folder: Path | None = None) -> str | None:
    """The path of a command: in a checkout's ``build/bin`` or ``folder`` itself; or next to this Python, or on PATH."""
    if folder is None:
        return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    places = (folder / "build" / "bin", folder / "bin", folder)
    return next((path for place in places if (path := shutil.which(name, path=str(place.absolute())))), None)
