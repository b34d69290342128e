"""The command line: a table of commands, and what becomes of a user's mistake. Needs no torch."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console

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
from lisatune.cli.settings import settings
from lisatune.cli.train import train
from lisatune.common.console import tell, warn
from lisatune.errors import RenamedSetting, Stopped, UserError
from lisatune.processes.launch import num_started, number_started

COMMANDS: dict[str, Callable[..., None]] = {
    "init": init,
    "train": train,
    "data": data,
    "plan": plan,
    "compare": compare,
    "chat": chat,
    "eval": evaluate,
    "export": export,
    "report": report,
    "norms": norms,
    "score-layers": score_layers,
    "mt-bench": mt_bench,
    "settings": settings,
    "env": env,
    "demo": demo,
}
TAKES_SETTINGS = ("train", "data", "plan", "compare")


app = typer.Typer(
    help="Fine-tune every weight matrix of a language model in the memory that LoRA needs (LISA, arXiv:2403.17919).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for name, run_command in COMMANDS.items():
    epilog = "All settings with their defaults: lisatune settings" if name in TAKES_SETTINGS else None
    app.command(name, epilog=epilog)(run_command)


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
    from lisatune.settings.hints import hint_for

    if words[:1] and words[0] in TAKES_SETTINGS:
        for word in words[1:]:
            name = word.partition("=")[0]
            if name.startswith("--") and (hint := hint_for(name)):
                raise UserError(f"no such option: {name}{hint}; settings are written as in max_length=512")


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit status 2."""
    console = Console(stderr=True)
    name = "lisatune" if number_started() == 0 else f"lisatune (rank {number_started()})"
    warnings.showwarning = _show_warning
    try:
        if num_started() > 1 and sys.argv[1:2] != ["train"]:
            raise UserError("several processes can only train: start this command once, without torchrun")
        check_options(sys.argv[1:])
        app()
    except UserError as error:
        tell(console, f"{name}: {error}", style="red")
        sys.exit(2)
    except Stopped as stopped:
        if number_started() == 0:
            warn(console, f"lisatune: {stopped}")
        sys.exit(128 + stopped.signal)
