"""`lisatune compare`."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lisatune.cli.common import MACHINE, OUTPUT, AsJson, ConfigFile, DataName, ModelName, console, given
from lisatune.cli.watch import watched
from lisatune.common.console import tell
from lisatune.errors import UserError


def compare(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE,...]...",
            help="Settings, each with one value or several. lora.learning_rate=... is for one method alone.",
        ),
    ] = None,
    config: ConfigFile = None,
    model: ModelName = None,
    data: DataName = None,
    output: Annotated[
        str | None,
        typer.Option(help="Folder of the comparison. If it exists, the comparison resumes.", rich_help_panel=OUTPUT),
    ] = None,
    drop_models: Annotated[
        bool,
        typer.Option(
            "--drop-models", help="Keep the numbers of finished runs, not their weights.", rich_help_panel=OUTPUT
        ),
    ] = False,
    as_json: AsJson = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="Run again what has failed.", rich_help_panel="Stop and resume")
    ] = False,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Show the runs in the browser, as lisatune watch does, until all have ended.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="MEMORY",
            help="Choose the best among runs within this peak memory, for example 24GiB.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
) -> None:
    """Compare methods and settings, each at its own best learning rate.

    Every value of a setting is run with every seed. A comparison that was stopped resumes with the same command.

    Example:
        lisatune compare --model HuggingFaceTB/SmolLM2-135M --data rows.jsonl \\
            --output cmp methods=lisa,lora,full learning_rate=1e-4,3e-4,1e-3 \\
            seed=0,1,2 max_steps=200 eval_rows=100
    """
    from lisatune.common.amounts import parse_bytes
    from lisatune.compare.grid import read_grid
    from lisatune.compare.runner import compare as compare_all
    from lisatune.compare.table import show

    grid = read_grid(config, overrides or []) | given(model=model, data=data)
    folder = output or grid.pop("output", None)
    if not isinstance(folder, str):
        raise UserError("output is missing: give --output, the folder of the comparison")
    memory_bytes = None if memory is None else parse_bytes(memory)
    with watched(Path(folder)) if watch else nullcontext():
        result = compare_all(
            grid, Path(folder), console=console, memory_bytes=memory_bytes, retry=retry, drop_models=drop_models
        )
    if as_json:
        print(json.dumps(result))
    else:
        Console().print(show(result))
        tell(console, f"the page: {Path(folder) / 'report.html'}")
