"""`lisatune plan`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from lisatune.cli.common import (
    INPUT,
    MACHINE,
    AsJson,
    ConfigFile,
    Overrides,
    check_host_memory,
    console,
    given,
    heavy_imports,
)
from lisatune.errors import UserError


def plan(
    overrides: Overrides = None,
    config: ConfigFile = None,
    model: Annotated[
        str | None, typer.Option(help="Folder, config.json or hub name of the model.", rich_help_panel=INPUT)
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="Methods to compare. With --gpu-memory, the first one is made to fit.", rich_help_panel="Method"
        ),
    ] = "lisa,lora,full",
    gpu_memory: Annotated[
        str | None,
        typer.Option(help="Find settings that fit into this memory, for example 24GiB.", rich_help_panel=MACHINE),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(
            help="With --gpu-memory: host memory that a process may take, for example 64GiB. Python and its libraries come on top.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cuda, mps or cpu.", rich_help_panel=MACHINE)] = "cuda",
    nproc: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Processes (GPUs) that train together, on all hosts.", rich_help_panel=MACHINE
        ),
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Predict the peak memory of a run, and find settings that fit your card.

    It needs no weights and no GPU.

    Example:
        lisatune plan --model HuggingFaceTB/SmolLM2-135M max_length=2048
        lisatune plan --model HuggingFaceTB/SmolLM2-135M \\
            --gpu-memory 24GiB --method lisa
    """
    from lisatune.common.amounts import parse_bytes
    from lisatune.settings import read_settings

    settings = read_settings(config, overrides or []) | given(model=model)
    settings.pop("device", None)
    memory_bytes = None if gpu_memory is None else parse_bytes(gpu_memory)
    host_bytes = None if host_memory is None else parse_bytes(host_memory)
    check_host_memory(host_bytes, memory_bytes, device, "--gpu-memory")
    methods = [settings.pop("method")] if "method" in settings else [m.strip() for m in method.split(",")]
    if settings.get("model") is None:
        raise UserError("model is missing: give --model, a Hugging Face folder, a config.json or a hub name")
    with heavy_imports():
        from lisatune.plan.ladder import forecast

    with console.status("planning"):
        result = forecast(settings, methods, device, memory_bytes, nproc, host_bytes)
    if as_json:
        print(json.dumps(result.as_dict()))
        return
    from lisatune.plan.table import show_plans, show_rungs

    out = Console()
    out.print(show_plans(result.plans, result.budget, result.refused))
    if result.budget is not None:
        out.print(show_rungs(result.rungs, result.budget, result.reach))
