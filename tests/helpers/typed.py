"""A command as it is typed, in this process: importing torch takes most of the time of a process of its own."""

import contextlib
import io
import os
import sys
from dataclasses import dataclass
from unittest import mock

from lisatune.cli import main


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def typed(*words, cwd=None, columns=200):
    """Run ``lisatune`` with ``words``, as its entry point does, in a terminal of so many columns."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd or os.getcwd()),
        mock.patch.object(sys, "argv", ["lisatune", *map(str, words)]),
        mock.patch.dict(os.environ, {"COLUMNS": str(columns), "NO_COLOR": "1"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
    return Done(code, out.getvalue(), err.getvalue())
