"""`lisatune settings`."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lisatune.cli.common import OUTPUT, AsJson
from lisatune.errors import UserError

Markdown = Annotated[
    bool, typer.Option("--markdown", help="Print the reference page of the documentation.", rich_help_panel=OUTPUT)
]
Schema = Annotated[
    bool,
    typer.Option(
        "--schema", help="Print a JSON schema, for an editor that checks config files.", rich_help_panel=OUTPUT
    ),
]


def settings(as_json: AsJson = False, markdown: Markdown = False, schema: Schema = False) -> None:
    """List every setting of a run with its default, in groups.

    Give settings to a command as key=value words, or in a YAML file with --config.

    Example:
        lisatune settings
        lisatune settings --schema > settings.schema.json
    """
    from lisatune.settings import listing

    if as_json + markdown + schema > 1:
        raise UserError("--json, --markdown and --schema are three forms of one list: give one of them")
    if as_json:
        print(json.dumps(listing.listed()))
    elif markdown:
        print(listing.page(), end="")
    elif schema:
        print(json.dumps(listing.schema(), indent=2))
    else:
        for heading, entries in groupby(listing.listed(), key=lambda entry: str(entry["group"])):
            table = Table("setting", "default", "what it does", title=heading, title_justify="left", title_style="bold")
            for entry in entries:
                table.add_row(entry["name"], listing.spelled(entry["default"]), listing.help_of(entry))
            Console().print(table)
