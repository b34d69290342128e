"""`lisatune compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lisatune.cli.common import AsJson, DataName, ModelName, console, given
from lisatune.common.console import tell
from lisatune.errors import UserError


def compare(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE,...]...",
            help="Settings, each with a value or several: method=lisa,lora seed=0,1 learning_rate=1e-4,1e-3 "
            "lora.learning_rate=1e-3,3e-3",
        ),
    ] = None,
    config: Annotated[str | None, typer.Option(help="YAML file of settings; a list holds several values.")] = None,
    model: ModelName = None,
    data: DataName = None,
    output: Annotated[str | None, typer.Option(help="Folder of the comparison; one that is there goes on.")] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="MEMORY", help="Peak within which the best is looked for, for example 24GiB.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run again what has failed.")] = False,
    drop_models: Annotated[
        bool, typer.Option("--drop-models", help="Keep the numbers of finished runs, not their weights.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run methods and settings side by side, each at its own best learning rate, over seeds."""
    from lisatune.common.amounts import parse_bytes
    from lisatune.compare.grid import read_grid
    from lisatune.compare.runner import compare as compare_all
    from lisatune.compare.table import show

    grid = read_grid(config, overrides or []) | given(model=model, data=data)
    folder = output or grid.pop("output", None)
    if not isinstance(folder, str):
        raise UserError("output is missing: give --output, the folder of the comparison")
    memory_bytes = None if memory is None else parse_bytes(memory)
    result = compare_all(
        grid, Path(folder), console=console, memory_bytes=memory_bytes, retry=retry, drop_models=drop_models
    )
    if as_json:
        print(json.dumps(result))
    else:
        Console().print(show(result))
        tell(console, f"the page: {Path(folder) / 'report.html'}")
