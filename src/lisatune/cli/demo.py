"""`lisatune demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lisatune.cli.common import console, quiet_libraries


def demo(
    output: Annotated[Path, typer.Option(help="Folder of the run; a fresh one is chosen by default.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Watch a real pretrained model learn about this tool, on a CPU, in a few minutes."""
    quiet_libraries()
    from lisatune.demo import run_demo

    run_demo(output, console=console)
