"""`lisatune norms`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lisatune.cli.common import AsJson, console
from lisatune.common.console import tell
from lisatune.errors import NEEDS_MATPLOTLIB


def norms(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN]...", help="Folders of runs with norm_steps.")],
    output: Annotated[
        Path | None, typer.Option(help="Page to write; norms.html in the first run's folder by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """How far each layer moved, of several runs side by side, and norms.html."""
    from lisatune.study.study import read_norms, show, study, write_page

    found = [read_norms(run) for run in runs]
    result = study(found)
    if as_json:
        print(json.dumps(result))
        return
    Console().print(show(result))
    try:
        print(write_page(found, output or runs[0] / "norms.html"))
    except ImportError:
        tell(console, f"no norms.html, which {NEEDS_MATPLOTLIB}")
