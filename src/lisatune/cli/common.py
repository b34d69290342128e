"""What commands share: the console, an option, and silence of other libraries. Needs no torch."""

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

console = Console(stderr=True, quiet=number_started() > 0)  # of several processes one speaks

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def quiet_libraries() -> None:
    """Keep other libraries' bars and notes out of ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
