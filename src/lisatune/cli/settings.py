"""`lisatune settings`."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from lisatune.cli.common import AsJson


def settings(as_json: AsJson = False) -> None:
    """List all settings of a run with their defaults."""
    from lisatune.settings import TrainConfig

    rows = []
    for name, field in TrainConfig.model_fields.items():
        default = "(required)" if field.is_required() else field.default
        rows.append({"name": name, "default": default, "description": field.description})
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("setting", "default", "what it does")
    for row in rows:
        table.add_row(str(row["name"]), "" if row["default"] is None else str(row["default"]), row["description"])
    Console().print(table)
