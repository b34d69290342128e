"""`lisatune norms`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lisatune.cli.common import OUTPUT, AsJson, console
from lisatune.common.console import tell
from lisatune.errors import NEEDS_MATPLOTLIB


def norms(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN]...", help="Folders of runs with norm_steps set.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Page to write. Default: norms.html in the first run's folder.", rich_help_panel=OUTPUT),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how far each layer moved in one run or several, and write norms.html.

    Each run must have been trained with norm_steps.

    Example:
        lisatune norms runs/lora runs/full
    """
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
