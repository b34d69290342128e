"""``scores.json``: what was scored, under which conditions, so that nothing is computed twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lisatune.common.files import write_whole
from lisatune.errors import UserError
from lisatune.evaluation.tasks.score import Score

FILE = "scores.json"


@dataclass(frozen=True)
class Conditions:
    """All that a score depends on, beside the task and the model."""

    limit: int | None
    num_fewshot: int | None
    chat_template: bool
    data_dir: str | None
    dtype: str
    harness: str = field(default_factory=lambda: version("lm-eval"))


class Record:
    """Scores by model, task and conditions; those of several folders may be read into one.

    Example:
        >>> import tempfile
        >>> folder, how = Path(tempfile.mkdtemp()), Conditions(8, None, False, None, "float32", "0.4.13")
        >>> record = Record()
        >>> record.add("org/model", "mmlu", how, {"mmlu": Score("acc", 0.5, 0.1, 8)})
        >>> record.write(folder, ["org/model"])
        >>> again = Record()
        >>> again.read(folder)
        >>> again.get("org/model", "mmlu", how)["mmlu"].value
        0.5
    """

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, Any]] = {}

    def read(self, folder: Path) -> None:
        """Add what the folder's ``scores.json`` holds, if there is one.

        Raises: UserError if it cannot be read.
        """
        path = folder / FILE
        if not path.is_file():
            return
        try:
            for entry in json.loads(path.read_text(encoding="utf-8"))["entries"]:
                scores = {task: _score(score) for task, score in entry["scores"].items()}
                self.add(entry["model"], entry["task"], Conditions(**entry["conditions"]), scores, entry["weights"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} cannot be read ({error}): remove it to score again") from error

    def get(self, model: str, task: str, conditions: Conditions) -> dict[str, Score] | None:
        """The scores of what ``task`` names, if ``model`` has been scored so with the weights that it has now."""
        entry = self._entries.get(_key(model, weights_of(model), task, conditions))
        return None if entry is None else entry["scores"]

    def add(
        self, model: str, task: str, conditions: Conditions, scores: Mapping[str, Score], weights: str | None = None
    ) -> None:
        """Remember ``scores``."""
        weights = weights_of(model) if weights is None else weights
        self._entries[_key(model, weights, task, conditions)] = {
            "model": model, "weights": weights, "task": task, "conditions": asdict(conditions), "scores": dict(scores)
        }  # fmt: skip

    def pairs(self, base: str) -> Iterator[tuple[Conditions, str, Score | None, Score]]:
        """Conditions, task, its score of the model ``base`` if known, and of what was made of it; the last of each.

        Example:
            >>> how, record = Conditions(8, None, False, None, "float32", "0.4.13"), Record()
            >>> record.add("org/model", "mmlu", how, {"mmlu": Score("acc", 0.5, 0.1, 8)})
            >>> record.add("runs/lisa/model", "mmlu", how, {"mmlu": Score("acc", 0.6, 0.1, 8)})
            >>> [(task, before.value, after.value) for _, task, before, after in record.pairs("org/model")]
            [('mmlu', 0.5, 0.6)]
        """
        found: dict[bool, dict[tuple[Conditions, str], Score]] = {True: {}, False: {}}
        for entry in self._entries.values():
            for task, score in entry["scores"].items():
                found[entry["model"] == base][Conditions(**entry["conditions"]), task] = score
        for (conditions, task), after in found[False].items():
            yield conditions, task, found[True].get((conditions, task)), after

    def write(self, folder: Path, models: list[str]) -> None:
        """Write ``scores.json`` of what is known of ``models``."""
        entries = [
            entry | {"scores": {task: asdict(score) for task, score in entry["scores"].items()}}
            for entry in self._entries.values()
            if entry["model"] in models
        ]
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / FILE, json.dumps({"entries": entries}) + "\n")


def weights_of(model: str) -> str:
    """What a local model's files are known by: their names, sizes and times; nothing for a hub name."""
    path = Path(model).expanduser()
    kinds = (".safetensors", ".json", ".gguf", ".jinja")
    files = sorted(file for file in path.iterdir() if file.suffix in kinds) if path.is_dir() else [path]
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16] if facts else ""


def _key(model: str, weights: str, task: str, conditions: Conditions) -> str:
    return json.dumps([model, weights, task, asdict(conditions)])


def _score(plain: Mapping[str, Any]) -> Score:
    parts = {name: _score(part) for name, part in plain["parts"].items()}
    return Score(**(dict(plain) | {"parts": parts, "values": tuple(plain["values"])}))
