"""Settings of whole runs, with comments, for people to start from; ``examples/`` links to them."""

from __future__ import annotations

import shlex
from importlib.resources import files
from pathlib import Path

from lisatune.errors import UserError, did_you_mean, one_line


def names() -> list[str]:
    """The recipes' names.

    Example:
        >>> names()
        ['continue', 'dpo', 'gsm8k', 'instructions', 'pubmedqa']
    """
    return sorted(Path(file.name).stem for file in files(__name__).iterdir() if file.name.endswith(".yaml"))


def text_of(name: str, path: Path) -> str:
    """A recipe as a file that will be at ``path``, which its comments name.

    Raises: UserError for a name that is not in ``names()``.
    """
    if name not in names():
        raise UserError(f"'{name}' is not a recipe: choose one of {', '.join(names())}{did_you_mean(name, names())}")
    text = (files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")
    return text.replace(f"examples/{name}.yaml", shlex.quote(one_line(str(path))))
