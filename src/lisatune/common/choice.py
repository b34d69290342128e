"""A choice that a setting names, in a registry that one can read without importing what it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Choice:
    """One of the values of a setting: where its code is, and what is true about it.

    Args:
        place: ``MODULE:NAME`` of a class or a function. It is imported when it is used, because it needs torch.
        whole: Each of several processes has to hold all weights whole.
    Example:
        >>> Choice("lisatune.common.amounts:gib").load()(2**30)
        '1.00 GiB'
    """

    place: str
    whole: bool = False

    def load(self) -> Any:
        """The class or function itself."""
        module, _, name = self.place.partition(":")
        return getattr(import_module(module), name)
