"""Names that settings had in an earlier version, and that are still understood."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from lisatune.errors import RenamedSetting, UserError
from lisatune.settings.config import ROWS

NEW_NAMES = {row.was: name for name, row in ROWS.items() if row.was}


def with_new_names(settings: Mapping[str, Any], *, warn: bool = True) -> dict[str, Any]:
    """``settings`` with new names in place of old ones.

    Raises: UserError if both are given.
    Example:
        >>> with_new_names({"seed": 1, "eval_every": 5}, warn=False)
        {'seed': 1, 'eval_tasks_steps': 5}
    """
    for old in NEW_NAMES.keys() & settings.keys():
        if NEW_NAMES[old] in settings:
            raise UserError(f"{old} is the old name of {NEW_NAMES[old]}: give one of them")
        if warn:
            text = (
                f"{old} is called {NEW_NAMES[old]} now: use the new name, the old one will not work in the next version"
            )
            warnings.warn(text, RenamedSetting, stacklevel=3)
    return {NEW_NAMES.get(name, name): value for name, value in settings.items()}
