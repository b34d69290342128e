"""`lisatune demo`."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lisatune.errors import Stopped, UserError
from lisatune.processes.launch import command, num_started, number_started, without_nproc
from lisatune.cli.common import AsJson, console, quiet_libraries



def demo(
    output: Annotated[Path, typer.Option(help="Folder of the run; a fresh one is chosen by default.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Watch a real pretrained model learn about this tool, on a CPU, in a few minutes."""
    quiet_libraries()
    from lisatune.demo import run_demo

    run_demo(output, console=console)
