"""How the site shows docstrings: ``Raises:``, ``Cost:`` and the like become paragraphs, ``Example:`` becomes code.

mkdocs.yml names this file as an extension of griffe, which reads the docstrings for mkdocstrings.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(Returns|Raises|Cost|Reference|Example):[ ]?(.*)$", re.MULTILINE)


def in_paragraphs(text: str) -> str:
    """A docstring whose sections begin with an empty line, as griffe wants them.

    Example:
        >>> print(in_paragraphs("Add.\\nRaises: UserError for text.\\nExample:\\n    >>> 1 + 1\\n    2"))
        Add.
        <BLANKLINE>
        **Raises:** UserError for text.
        <BLANKLINE>
        Examples:
            >>> 1 + 1
            2
    """

    def heading(match: re.Match[str]) -> str:
        return f"\n**{match[1]}:** {match[2]}" if match[2] else f"\n{match[1].removesuffix('s')}s:"

    return SECTION.sub(heading, text)


class Sections(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = in_paragraphs(obj.docstring.value)
