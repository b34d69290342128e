"""The one kind of error that a user can cause and mend."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """A user's mistake, told in one sentence with the remedy; the command line prints it and exits with status 2.

    What the message quotes (names, rows, other libraries) is made safe to print: see ``one_line``.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class BadRowError(UserError):
    """A row that was met while a run was under way; what was trained so far is saved before it is told."""


class Stopped(Exception):
    """A run was asked to stop by a signal, and has saved what it had.

    Attributes:
        signal: The signal's number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class RenamedSetting(FutureWarning):
    """A setting was given by its old name, which still works in this version."""


class MissingPackageError(UserError, ImportError):
    """A feature was asked for whose package is not installed."""


def one_line(text: str, most_letters: int = 1000) -> str:
    """``text`` on one line that every terminal and log can take.

    Control characters, invisible ones and halves of surrogate pairs are written as escapes, so that what a file or a name
    holds can neither move the cursor nor fail to print; user and password of an address are starred; of a long text
    the middle is left out.

    Example:
        >>> one_line("no\\nfile \\x1b[31m\\ud800 at https://me:secret@host/x")
        'no file \\\\x1b[31m\\\\ud800 at https://***@host/x'
    """
    text = re.sub(r"://[^/\s]*@", "://***@", text)
    if len(text) > most_letters:
        text = f"{text[: most_letters // 2]} ... {text[-most_letters // 2 :]}"
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)


def missing_package(package: str, feature: str, extra: str) -> MissingPackageError:
    """The error for an optional package that is absent.

    Example:
        >>> print(missing_package("peft", "method=lora", "lora"))
        method=lora needs the package peft: pip install 'lisatune[lora]'
    """
    return MissingPackageError(f"{feature} needs the package {package}: pip install 'lisatune[{extra}]'")


NEEDS_MATPLOTLIB = "needs matplotlib: pip install 'lisatune[report]'"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint at the nearest known word, or nothing.

    Example:
        >>> did_you_mean("learning_rat", ["learning_rate", "seed"])
        "; did you mean 'learning_rate'?"
    """
    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""


def shown(value: Any) -> str:
    """``repr(value)`` for a message, cut: a YAML alias can make it endless."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 120
    short.maxlevel = 2
    try:
        return short.repr(value)
    except ValueError:  # int writes 4,300 digits at most
        return "a number of too many digits"
