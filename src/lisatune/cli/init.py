"""`lisatune init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lisatune.cli.common import OUTPUT, console
from lisatune.common.console import tell
from lisatune.errors import UserError
from lisatune.recipes import names, text_of


def init(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help=f"One of {', '.join(names())}.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="File to write. Default: RECIPE.yaml.", rich_help_panel=OUTPUT)
    ] = None,
) -> None:
    """Write a recipe to start from: a file of settings with comments.

    Nothing is overwritten.

    Example:
        lisatune init instructions
        lisatune train --config instructions.yaml
    """
    if recipe is None:
        raise UserError(f"recipe is missing: choose one of {', '.join(names())}, as in lisatune init instructions")
    path = output or Path(f"{recipe}.yaml")
    text = text_of(recipe, path)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UserError(f"{path} exists already, and nothing is overwritten: choose another --output") from error
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}): choose another --output") from error
    tell(console, f"wrote {path}; its first lines say what to run")
