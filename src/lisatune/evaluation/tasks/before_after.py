"""Models and runs scored on tasks; of a run the model that it began with too, and what lies between the two."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lisatune.common.bars import scoring_bar
from lisatune.common.console import warn
from lisatune.common.files import write_whole
from lisatune.common.run_folder import finished, only_run
from lisatune.errors import UserError
from lisatune.evaluation.tasks.record import Conditions, Record
from lisatune.evaluation.tasks.score import Score, difference, numbers
from lisatune.evaluation.tasks.scorer import Scorer
from lisatune.models.load import load_model, pick_device
from lisatune.models.names import check_model_name, model_of, trusts_code
from lisatune.settings import read_settings


@dataclass(frozen=True)
class Target:
    """What is scored.

    Attributes:
        name: Its name, as the user gave it.
        model: Folder or hub name of the model.
        base: The model that a run began with; None for a model that is no run.
        folder: Where the scores are written; None is nowhere.
    """

    name: str
    model: str
    base: str | None
    folder: Path | None

    def models(self) -> list[str]:
        """Before and after, or the model alone."""
        return [self.model] if self.base is None else [self.base, self.model]


@dataclass(frozen=True)
class Scored:
    """The scores of a target, by task; ``before`` is None for a model that is no run."""

    target: Target
    before: dict[str, Score] | None
    after: dict[str, Score]

    def as_dict(self) -> dict[str, Any]:
        """Plain values; each document's stay in ``scores.json``."""
        result: dict[str, Any] = {"name": self.target.name, "model": self.target.model, "after": _plain(self.after)}
        if self.before is None:
            return result
        differences = {task: difference(self.before[task], self.after[task]) for task in self.after}
        return result | {"base": self.target.base, "before": _plain(self.before), "difference": differences}


def find_target(name: str, output: Path | None = None) -> Target:
    """A run's folder or a model as something to score; costs a look at the folder.

    Raises: UserError if there is no model.
    """
    path = Path(name).expanduser()
    if not (path / "config.yaml").is_file():
        check_model_name(name)
        return Target(name, name, None, output)
    trained = model_of(name)
    if trained == name:
        raise UserError(
            f"{name}: holds no trained model; the run is not finished, or its model was dropped: run it again"
        )
    check_model_name(trained)
    base = read_settings(str(path / "config.yaml"), []).get("model")
    if not isinstance(base, str):
        raise UserError(f"{path / 'config.yaml'}: does not name the base model; give {trained} instead")
    check_model_name(base)
    return Target(name, trained, base, output or path)


def score_targets(
    targets: Sequence[Target],
    tasks: Sequence[str],
    *,
    data_dir: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    batch_size: int = 8,
    device: str = "auto",
    trust_remote_code: bool = False,
    console: Console,
) -> list[Scored]:
    """Score every target on every task; what was scored before under the same conditions is taken from ``scores.json``.

    Each task's scores are written as soon as they are there: into ``scores.json``, and the run's into its
    ``summary.json``, where ``lisatune compare`` finds them.

    Raises: UserError as ``Scorer`` and ``load_model``.
    """
    # what was scored before under these conditions
    where = pick_device(device)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    conditions = Conditions(
        limit, num_fewshot, chat_template, None if data_dir is None else str(data_dir.resolve()), str(dtype)[6:]
    )
    record = Record()
    for folder in {target.folder for target in targets if target.folder is not None}:
        record.read(folder)

    # each model is loaded once, for the tasks that it has not been scored on
    scorers: dict[str, Scorer] = {}
    for target in targets:
        for name in target.models():
            missing = [task for task in tasks if record.get(name, task, conditions) is None]
            if not missing:
                continue
            for task in missing:
                if task not in scorers:
                    scorers[task] = Scorer(
                        [task], data_dir=data_dir, limit=limit, num_fewshot=num_fewshot, chat_template=chat_template
                    )
            trusted = trust_remote_code or trusts_code(target.name)
            model, tokenizer = load_model(name, dtype, trust_remote_code=trusted)
            model.to(where)
            for task in missing:
                scorer = scorers[task]
                with scoring_bar(f"{name}: {task}", console) as progress:
                    scores = scorer(model, tokenizer, batch_size=batch_size, progress=progress)
                if scorer.num_cut:
                    warn(
                        console,
                        f"{name}, {task}: {scorer.num_cut:,} prompts are longer than the model's context; their beginning was cut",
                    )
                record.add(name, task, conditions, scores)
                _write(record, targets, target.folder)
            del model
        _write(record, targets, target.folder)

    # before and after side by side
    found = [_scored(target, tasks, record, conditions) for target in targets]
    for scored in found:
        _summarize(scored)
    return found


def _scored(target: Target, tasks: Sequence[str], record: Record, conditions: Conditions) -> Scored:
    def scores(model: str) -> Iterator[tuple[str, Score]]:
        for task in tasks:
            yield from (record.get(model, task, conditions) or {}).items()

    return Scored(target, None if target.base is None else dict(scores(target.base)), dict(scores(target.model)))


def _write(record: Record, targets: Sequence[Target], folder: Path | None) -> None:
    if folder is not None:
        record.write(folder, [name for target in targets if target.folder == folder for name in target.models()])


def _summarize(scored: Scored) -> None:
    """Put a run's scores into its summary, beside those of other tasks."""
    if scored.target.base is None:
        return
    folder = Path(scored.target.name).expanduser()
    with only_run(folder):
        summary = finished(folder)
        if summary is not None:
            summary["scores"] = (summary.get("scores") or {}) | numbers(scored.after)
            write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def _plain(scores: dict[str, Score]) -> dict[str, Any]:
    def without_values(result: dict[str, Any]) -> dict[str, Any]:
        del result["values"]
        for part in result["parts"].values():
            without_values(part)
        return result

    return {task: without_values(asdict(score)) for task, score in scores.items()}
