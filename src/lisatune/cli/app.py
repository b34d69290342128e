"""The command line: a table of commands, and what becomes of a user's mistake. Needs no torch."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from lisatune.cli import common
from lisatune.cli.chat import chat
from lisatune.cli.compare import compare
from lisatune.cli.data import data
from lisatune.cli.demo import demo
from lisatune.cli.env import env
from lisatune.cli.eval import evaluate
from lisatune.cli.export import export
from lisatune.cli.init import init
from lisatune.cli.mt_bench import mt_bench
from lisatune.cli.norms import norms
from lisatune.cli.plan import plan
from lisatune.cli.report import report
from lisatune.cli.score_layers import score_layers
from lisatune.cli.serve import serve
from lisatune.cli.settings import settings
from lisatune.cli.studio import studio
from lisatune.cli.train import train
from lisatune.cli.watch import watch
from lisatune.common.console import tell, warn
from lisatune.errors import RenamedSetting, Stopped, UserError
from lisatune.processes.launch import num_started, number_started

COMMANDS_OF: dict[str, dict[str, Callable[..., None]]] = {
    "Start": {"demo": demo, "init": init, "settings": settings},
    "Train": {"data": data, "plan": plan, "train": train, "watch": watch, "studio": studio},
    "Use a model": {"chat": chat, "serve": serve, "export": export},
    "Measure": {"eval": evaluate, "mt-bench": mt_bench, "compare": compare, "report": report},
    "Study layers": {"norms": norms, "score-layers": score_layers},
    "Help": {"env": env},
}  # the headings of `lisatune --help`
COMMANDS = {name: command for commands in COMMANDS_OF.values() for name, command in commands.items()}
TAKES_SETTINGS = ("train", "data", "plan", "compare")
HELP = """Fine-tune every weight matrix of a language model in the memory that LoRA needs.

The method is LISA, Layerwise Importance Sampled AdamW (arXiv:2403.17919).

Example:
    lisatune train --model HuggingFaceTB/SmolLM2-135M --data rows.jsonl \\
        --output runs/a
    lisatune chat runs/a
"""


class Command(TyperCommand):
    """A command whose ``--help`` has a heading too, below the others."""

    def get_help_option(self, ctx: Any) -> Any:
        option: Any = super().get_help_option(ctx)
        option.rich_help_panel = common.OTHER
        return option


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lisatune {metadata.version('lisatune')}")
        raise typer.Exit


app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback(help=HELP)
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of no command."""


for heading, commands in COMMANDS_OF.items():
    for name, run_command in commands.items():
        epilog = "Every setting with its default: lisatune settings" if name in TAKES_SETTINGS else None
        app.command(name, cls=Command, epilog=epilog, rich_help_panel=heading)(run_command)


_show_python_warning = warnings.showwarning


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **file: Any) -> None:
    """A warning about a setting is a sentence for the user, without a place in our code."""
    if issubclass(category, RenamedSetting):
        warn(common.console, str(message))
    else:
        _show_python_warning(message, category, *place, **file)


def check_options(words: list[str]) -> None:
    """Refuse an option of another tool with the name that we use; others are the parser's to refuse.

    Raises: UserError with a hint.
    """
    if words[:1] and words[0] in TAKES_SETTINGS:
        from lisatune.settings.hints import hint_for

        if words[0] == "plan" and any(word.partition("=")[0] in ("--data", "--output") for word in words):
            raise UserError(
                "plan reads no data and writes nothing: leave out --data and --output; max_length=N is the length of its rows"
            )
        for word in words[1:]:
            name = word.partition("=")[0]
            if name.startswith("--") and (hint := hint_for(name)):
                raise UserError(f"no such option: {name}{hint}; write settings as in max_length=512")


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit status 2."""
    console = Console(stderr=True)
    name = "lisatune" if number_started() == 0 else f"lisatune (rank {number_started()})"
    warnings.showwarning = _show_warning
    try:
        if num_started() > 1 and sys.argv[1:2] != ["train"]:
            raise UserError("only lisatune train works on several processes: start this command once, without torchrun")
        check_options(sys.argv[1:])
        app()
    except UserError as error:
        tell(console, f"{name}: {error}", style="red")
        sys.exit(2)
    except Stopped as stopped:
        if number_started() == 0:
            warn(console, f"lisatune: {stopped}")
        sys.exit(128 + stopped.signal)
