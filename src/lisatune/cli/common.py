"""What commands share: the console, options, and silence of other libraries. Needs no torch."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from rich.console import Console

from lisatune.processes.launch import number_started

console = Console(stderr=True, quiet=number_started() > 0)  # of several processes one speaks

# options that mean the same in each command that has them
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, which win over the file's.")
]
ConfigFile = Annotated[str | None, typer.Option(help="YAML file of settings.")]
ModelName = Annotated[str | None, typer.Option(help="Folder, .gguf file or hub name of the model.")]
DataName = Annotated[str | None, typer.Option(help="File, folder or hub name of the rows to learn.")]
AnyDevice = Annotated[str, typer.Option(help="cpu, cuda, ... or auto.")]
AnswerTokens = Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that the model's folder brings along, as its run did anyway."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def given(**options: Any) -> dict[str, Any]:
    """The options that were given, by the names of the settings that they stand for.

    Example:
        >>> given(model="m", data=None)
        {'model': 'm'}
    """
    return {name: value for name, value in options.items() if value is not None}


def quiet_libraries() -> None:
    """Keep other libraries' bars and notes out of ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
