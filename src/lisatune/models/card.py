"""The model card: what a trained model was made of, for those who get it. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from lisatune.common.amounts import peak_of
from lisatune.common.loss_names import ending_lines, loss_lines
from lisatune.errors import one_line
from lisatune.settings import TrainConfig, used_settings


def model_card(
    config: TrainConfig,
    summary: Mapping[str, Any],
    *,
    data: Sequence[tuple[str, str]],
    versions: Mapping[str, str],
    scores_before: Mapping[str, float],
) -> str:
    """``README.md`` of a trained model, in Markdown, with the metadata block that the hub reads.

    The card is made to be shared. Paths of this machine are cut to their last name, and passwords in addresses are starred.

    Args:
        config: Settings of the run.
        summary: The results, as ``summary.json`` holds them.
        data: Each data set with what is said of its size.
        versions: What the run was computed with.
        scores_before: Scores on tasks before the first step, by name.
    """
    base = shareable(config.model)
    results = [*loss_lines(summary), *_score_lines(scores_before, summary.get("scores", {}))]
    seconds = summary["train_seconds"]
    cost = {
        "steps": f"{summary['steps']:,}",
        **dict(ending_lines(summary)),
        "tokens": f"{summary['tokens']:,}",
        "time": f"{seconds:,.0f} s",
        "peak memory": peak_of(summary),
    }
    parts = [
        f"---\n{_metadata(config, [name for name, _ in data])}\n---",
        f"# {_plain(Path(config.output).name)}",
        f"{_plain(base)}, fine-tuned with lisatune and the method `{config.method}`.\n"
        "Read the licences of the base model and of the data before you share this model.",
        "## Data",
        _table(("data set", "size"), [(shareable(name), size) for name, size in data]),
        "## Results",
        _table(("measure", "before -> after"), results)
        if results
        else "Nothing was held out, so nothing was measured.",
        "## Cost",
        _table(("what", "how much"), cost.items()),
        "## Settings",
        "With these settings in `config.yaml`, `lisatune train --config config.yaml` repeats the run. Settings that are not\n"
        "listed had their defaults. Paths are cut to their last name.",
        _indented(yaml.safe_dump(_chosen(config), sort_keys=False, allow_unicode=True)),
        "## Versions",
        _table(("what", "version"), versions.items()),
    ]
    return "\n\n".join(parts) + "\n"


def shareable(name: str) -> str:
    """A name of a model or of data without what it says about this machine.

    Example:
        >>> shareable("HuggingFaceTB/SmolLM2-135M"), shareable("/home/me/models/mine"), shareable("~/rows.jsonl")
        ('HuggingFaceTB/SmolLM2-135M', 'mine', 'rows.jsonl')
    """
    is_path = os.path.exists(name) or name.startswith(("/", "~", "."))
    return one_line(Path(os.path.abspath(name)).name if is_path else name)


def on_hub(name: str) -> bool:
    """Whether ``name`` can be a repository of the hub: it is one by its form, and nothing here has that path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.exists(name)


def _metadata(config: TrainConfig, data: Iterable[str]) -> str:
    return ModelCardData(
        base_model=config.model if on_hub(config.model) else None,
        datasets=[name for name in dict.fromkeys(data) if on_hub(name)] or None,
        library_name="transformers",
        tags=["lisatune", config.method],
    ).to_yaml()


def _chosen(config: TrainConfig) -> dict[str, Any]:
    """The settings that play a part and were given, or follow from the method, as they can be shared."""
    usual = {name: field.default for name, field in TrainConfig.model_fields.items()}
    chosen = {n: v for n, v in used_settings(config).items() if n in config.model_fields_set or v != usual[n]}
    return {name: _cut(value) for name, value in chosen.items()}


def _cut(value: Any) -> Any:
    if isinstance(value, str):
        return shareable(value)
    if isinstance(value, Mapping):
        return {key: _cut(inner) for key, inner in value.items()}
    return [_cut(inner) for inner in value] if isinstance(value, list | tuple) else value


def _score_lines(before: Mapping[str, float], after: Mapping[str, float]) -> Iterable[tuple[str, str]]:
    for name, score in after.items():
        yield name, f"{before[name]:.4g} -> {score:.4g}" if name in before else f"not measured -> {score:.4g}"


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [head, ("---", "---"), *((_plain(a), _plain(b)) for a, b in rows)]
    return "\n".join(f"| {a} | {b} |" for a, b in lines)


def _plain(text: str) -> str:
    """``text`` as Markdown shows it letter by letter: a name can hold a link, a tag or the border of a cell."""
    escaped = one_line(text).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{letter}" if letter in "\\`*_[]|#" else letter for letter in escaped)


def _indented(text: str) -> str:
    """A block of code, which no line of ``text`` can end."""
    return "\n".join(f"    {line}" for line in text.splitlines())
