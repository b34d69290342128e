"""`lisatune plan`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from lisatune.cli.common import AsJson, ConfigFile, Overrides, console, given, quiet_libraries
from lisatune.errors import UserError


def plan(
    overrides: Overrides = None,
    config: ConfigFile = None,
    model: Annotated[str | None, typer.Option(help="Folder, config.json or hub name of the model.")] = None,
    method: Annotated[
        str, typer.Option(help="Methods to put side by side; with --gpu-memory levers are pulled for the first.")
    ] = "lisa,lora,full",
    gpu_memory: Annotated[str | None, typer.Option(help="Find what fits into it, for example 24GiB.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    nproc: Annotated[
        int, typer.Option(min=1, metavar="N", help="Processes (GPUs) that train together, of all hosts.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Predict the peak memory of a run, without weights and without a GPU, and find what fits."""
    from lisatune.common.amounts import parse_bytes
    from lisatune.settings import read_settings

    settings = read_settings(config, overrides or []) | given(model=model)
    settings.pop("device", None)
    memory_bytes = None if gpu_memory is None else parse_bytes(gpu_memory)
    methods = [settings.pop("method")] if "method" in settings else [m.strip() for m in method.split(",")]
    if settings.get("model") is None:
        raise UserError("model is missing: give --model, a Hugging Face folder, a config.json or a hub name")
    quiet_libraries()
    from lisatune.plan.ladder import forecast

    with console.status("planning"):
        result = forecast(settings, methods, device, memory_bytes, nproc)
    if as_json:
        print(json.dumps(result.as_dict()))
        return
    from lisatune.plan.table import show_plans, show_rungs

    out = Console()
    out.print(show_plans(result.plans, result.budget, result.refused))
    if result.budget is not None:
        out.print(show_rungs(result.rungs, result.budget, result.reach))
