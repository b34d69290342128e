"""What commands share: the console, options, and silence of other libraries. Needs no torch."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from lisatune.errors import UserError
from lisatune.processes.launch import number_started

console = Console(stderr=True, quiet=number_started() > 0)  # one of several processes speaks

# headings of the help under which commands put their options; a command names a heading of its own too
INPUT, ANSWERS, OUTPUT, MACHINE, OTHER = "Model and data", "Answers", "Output", "Machine", "Other"

# options that mean the same in each command that has them
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings. They win over the file's. See: lisatune settings"),
]
ConfigFile = Annotated[str | None, typer.Option(help="YAML file of settings.", rich_help_panel=INPUT)]
ModelName = Annotated[
    str | None, typer.Option(help="Folder, .gguf file or hub name of the model.", rich_help_panel=INPUT)
]
DataName = Annotated[
    str | None, typer.Option(help="File, folder or hub name of the rows to learn.", rich_help_panel=INPUT)
]
AnyDevice = Annotated[str, typer.Option(help="cpu, cuda, ... or auto.", rich_help_panel=MACHINE)]
AnswerTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.", rich_help_panel=ANSWERS)]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the Python code in the model's folder. Runs that trained with it do so anyway.",
        rich_help_panel=MACHINE,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=OUTPUT)]


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


@contextmanager
def heavy_imports() -> Iterator[None]:
    """For imports inside that bring torch; those that every model of transformers brings are added.

    Python looks for garbage in cycles while it imports, and in all that was imported when it ends. That takes 1.8 of the
    3.9 processor seconds of a command that does no more. Here it does not look, neither now nor later.
    """
    quiet_libraries()
    gc.disable()
    try:
        yield
        from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # noqa: F401 - loaded by being named
    finally:
        gc.freeze()
        gc.enable()


def check_host_memory(host_bytes: int | None, memory_bytes: int | None, device: str, other: str) -> None:
    """Refuse ``--host-memory`` where it has no effect; ``other`` is the option that it goes with.

    Raises: UserError.
    """
    if host_bytes is None:
        return
    if memory_bytes is None:
        raise UserError(f"--host-memory has no effect without {other}: add it, or leave this out")
    if device == "cpu":
        raise UserError("--host-memory has no effect on a CPU, where host and device are one memory: leave it out")
