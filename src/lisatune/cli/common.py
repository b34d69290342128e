"""What commands share: the console, an option, and silence of other libraries. Needs no torch."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from rich.console import Console

from lisatune.processes.launch import number_started

console = Console(stderr=True, quiet=number_started() > 0)  # of several processes one speaks

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def quiet_libraries() -> None:
    """Keep other libraries' bars and notes out of ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
