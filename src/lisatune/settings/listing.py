"""The settings as a reference: plain values, a page, and a schema for editors."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from lisatune.methods import METHODS
from lisatune.settings.config import GROUPS, ROWS, TrainConfig, heading

PAGE = """# Settings

This page is written by `lisatune settings --markdown`. Give settings as `key=value` words, or as `key: value` lines of a
file: `lisatune train --config run.yaml`. A word wins over the file. `null` takes a setting back.

In an editor that checks YAML by a schema, `lisatune settings --schema` writes one.
"""


def listed() -> list[dict[str, Any]]:
    """Every setting in plain values: group, name, default, values that it takes, help, and what it is limited to."""
    schema = TrainConfig.model_json_schema()["properties"]
    return [
        {
            "group": heading(group),
            "name": name,
            "default": "(required)" if field.is_required() else field.default,
            "values": values_of(schema[name]),
            "description": field.description,
            "limits": _limits(name),
        }
        for group in GROUPS
        for name, field in group.model_fields.items()
    ]


def values_of(schema: dict[str, Any]) -> str:
    """What a JSON schema allows, in words.

    Example:
        >>> values_of({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]})
        'whole number from 1'
        >>> values_of({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1})
        'number above 0, below 1'
    """
    if "anyOf" in schema:
        return " or ".join(values_of(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return ", ".join(map(str, schema.get("enum", [schema.get("const")])))
    words = {
        "integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "array": "list",
        "object": "names with values",
    }  # fmt: skip
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "up to", "exclusiveMaximum": "below"}
    limits = [f"{word} {schema[key]:g}" for key, word in bounds.items() if key in schema]
    return " ".join([words[schema["type"]], ", ".join(limits)]).strip()


def _limits(name: str) -> str:
    """What a setting is limited to, in sentences; empty if it is for every run."""
    row = ROWS[name]
    others = [method for method in METHODS if row.methods and method not in row.methods]
    most = len(others) < len(row.methods)  # then it is shorter to say which have no part in it
    only = [] if most or not others else [f"with method={' or '.join(row.methods)}"]
    only += [f"with task={' or '.join(row.tasks)}"] if row.tasks else []
    only += [f"with optim={' or '.join(row.optims)}"] if row.optims else []
    only += [f"without {one[:-5]}" if one.endswith("=null") else f"with {one}" for one in row.only_with]
    only += ["on a GPU"] if row.gpu else []
    only += ["with dp_shard_size=1"] if row.whole is True else []
    sentences = [f"Only {', '.join(only)}."] if only else []
    return " ".join(sentences + ([f"Not with method={' or '.join(others)}."] if others and most else []))


def help_of(entry: dict[str, Any]) -> str:
    """The help of a setting that is ``listed``, with what it is limited to."""
    return f"{entry['description']} {entry['limits']}".strip()


def page() -> str:
    """The reference of all settings in Markdown, a table a group."""
    parts = [PAGE]
    for title, entries in groupby(listed(), key=lambda entry: str(entry["group"])):
        rows = [(f"`{e['name']}`", spelled(e["default"]), e["values"], help_of(e)) for e in entries]
        head = [("setting", "default", "values", "what it does"), ("---",) * 4]
        lines = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |" for cells in head + rows]
        parts.append("\n".join([f"## {title}", "", *lines, ""]))
    return "\n".join(parts)


def schema() -> dict[str, Any]:
    """A JSON schema of the file that ``--config`` takes, in which no setting has to stand."""
    found = TrainConfig.model_json_schema()
    found.pop("required")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | found | {"title": "lisatune train"}


def spelled(default: Any) -> str:
    """A default as one types it; nothing for null."""
    if default is None:
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)
