"""The runs of some folders, and what is new in them since somebody last asked. It only reads."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lisatune.errors import UserError, shown
from lisatune.settings import TrainConfig, build_config, parse_settings, train_command
from lisatune.watch.files import news_of, read_text
from lisatune.watch.rows import metrics_row, number, parsed, sample_row, text

MOST_CONFIG_BYTES = 2**16
MOST_JSON_BYTES = 2**23
MOST_NEWS_BYTES = 2**18  # bytes of one answer: some 600 steps, 20 KB when compressed
LEAST_NEWS_BYTES = 2**16  # bytes of one run, whatever the number of runs: a line is shorter
MOST_NODES = 10_000  # nodes of a settings file: aliases of YAML can expand beyond any memory
MOST_ANSWERS = 200
CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
SAMPLES, ANSWERS = "samples.jsonl", "answers.json"


@dataclass(frozen=True)
class Run:
    """A run to watch.

    Attributes:
        folder: Where it is; it need not be there yet.
        name: How people know it.
        failure: Why it failed, if its comparison says so.
    """

    folder: Path
    name: str
    failure: str = ""

    @property
    def id(self) -> str:
        """What the page knows it by."""
        return hashlib.blake2s(str(self.folder).encode(errors="surrogateescape"), digest_size=6).hexdigest()


@dataclass
class Runs:
    """All runs in some folders: of runs, of comparisons, or folders that hold such.

    Args:
        folders: Whose runs are watched. Runs that begin later are found too, and a folder that is made later.
    Raises: UserError for a file.
    """

    folders: Sequence[Path]
    _facts: dict[str, tuple[Any, dict[str, Any]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.folders = list(dict.fromkeys(folder.expanduser().resolve() for folder in self.folders))
        for folder in self.folders:
            if folder.is_file():
                raise UserError(f"{folder} is a file: give the output folder of lisatune train or compare")

    def without_runs(self) -> list[Path]:
        """The folders in which no run has begun yet."""
        return [folder for folder in self.folders if not any(_runs_in(folder))]

    def all(self) -> list[Run]:
        """Those that there are now; of two with one name the folder above tells which is which."""
        found = {run.folder: run for folder in self.folders for run in _runs_in(folder)}
        names = [run.name for run in found.values()]
        return [
            run if names.count(run.name) == 1 else Run(run.folder, f"{run.folder.parent.name}/{run.name}", run.failure)
            for run in found.values()
        ]

    def news(self, known: Mapping[str, str]) -> dict[str, Any]:
        """What the page does not have yet.

        Args:
            known: Of each run by its id: the ``known`` of the answer before.
        Returns: ``runs``: of each run its ``id``, ``name``, ``known`` to ask with next time, ``age`` in seconds of its last
            line, and if there are any: ``facts``, and ``rows`` and ``samples`` to add to those before, or with ``anew`` to
            put in their place. ``more`` says that there is more already.
        """
        runs = self.all()
        most_bytes = max(LEAST_NEWS_BYTES, MOST_NEWS_BYTES // max(1, len(runs)))
        told = [self._news_of(run, known.get(run.id, ""), most_bytes) for run in runs]
        more = any(one.pop("more") for one in told)
        return {"runs": told, "more": more}

    def _news_of(self, run: Run, known: str, most_bytes: int) -> dict[str, Any]:
        metrics_place, samples_place, digest = [*known.split("/"), "", "", ""][:3]
        lines = news_of(run.folder / METRICS, metrics_place, most_bytes)
        samples = news_of(run.folder / SAMPLES, samples_place, most_bytes)
        told: dict[str, Any] = {"id": run.id, "name": run.name, "age": _age(run.folder / METRICS)}
        told["rows"] = [row for row in map(metrics_row, lines.lines) if row]
        told["samples"] = [row for row in map(sample_row, samples.lines) if row]
        told["anew"] = [name for name, one in (("rows", lines), ("samples", samples)) if one.anew]
        told = {name: value for name, value in told.items() if value not in ([], None)}
        facts = self._facts_of(run)
        new_digest = hashlib.blake2s(json.dumps(facts).encode(), digest_size=4).hexdigest()
        if new_digest != digest:
            told["facts"] = facts
        return told | {"known": f"{lines.place}/{samples.place}/{new_digest}", "more": lines.more or samples.more}

    def _facts_of(self, run: Run) -> dict[str, Any]:
        """``facts_of``, made again when one of its files has changed."""
        stamp = (run, *(_stamp(run.folder / name) for name in (CONFIG, SUMMARY, ANSWERS)))
        before, facts = self._facts.get(run.id, (None, {}))
        if before != stamp:
            facts = facts_of(run)
            self._facts[run.id] = (stamp, facts)
        return facts


def _runs_in(folder: Path) -> Iterator[Run]:
    """The run that ``folder`` is, the runs of the comparison that it is, or those of the folders in it."""
    if (folder / CONFIG).is_file():
        yield Run(folder, folder.name)
    elif (folder / "comparison.yaml").is_file():
        failures = _failures(folder / "comparison.json")
        for path in sorted((folder / "runs").glob("*.yaml")):
            inside = path.with_suffix("")
            if not (inside.is_symlink() or inside.parent.is_symlink()):
                yield Run(inside, inside.name, failures.get(inside.name, ""))
    elif folder.is_dir():
        for inside in sorted(folder.iterdir()):
            if not inside.is_symlink() and ((inside / CONFIG).is_file() or (inside / "comparison.yaml").is_file()):
                yield from _runs_in(inside)


def _failures(path: Path) -> dict[str, str]:
    loaded = parsed(read_text(path, MOST_JSON_BYTES) or "")
    runs = loaded.get("runs") if isinstance(loaded, dict) else None
    found = [run for run in runs if isinstance(run, dict)] if isinstance(runs, list) else []
    return {str(run.get("name")): str(text(run["failure"])) for run in found if text(run.get("failure"))}


def facts_of(run: Run) -> dict[str, Any]:
    """What does not change with each step: state, settings, the command, and what came out in the end.

    ``state`` is ``waiting`` (of a comparison: its turn has not come), ``begun``, ``finished`` or ``failed``.
    """
    config_text = read_text(run.folder / CONFIG, MOST_CONFIG_BYTES)
    summary = parsed(read_text(run.folder / SUMMARY, MOST_JSON_BYTES) or "")
    summary = {n: v for n, v in summary.items() if number(v) is not None} if isinstance(summary, dict) else None
    state = "begun" if config_text is not None else "waiting"
    facts: dict[str, Any] = {"folder": str(run.folder), "state": "failed" if run.failure else state}
    if summary is not None:
        facts |= {"state": "finished", "summary": {name: number(value) for name, value in summary.items()}}
    if run.failure:
        facts["failure"] = run.failure
    if config_text is not None:
        facts |= {"config": config_text} | _settings_facts(config_text)
    if answers := _answers(run.folder / ANSWERS):
        facts["answers"] = answers
    return facts


def _settings_facts(config_text: str) -> dict[str, Any]:
    """Settings in short, and the command; nothing for what is no run's."""
    with suppress(UserError):
        settings = parse_settings(config_text, CONFIG)
        if num_nodes(settings) > MOST_NODES:
            return {}
        facts: dict[str, Any] = {"settings": {str(n): _in_short(v) for n, v in settings.items()}}
        config = _config(settings)
        return (
            facts if config is None else facts | {"command": train_command(config), "steps": number(config.max_steps)}
        )
    return {}


def _in_short(value: Any) -> str:
    return text(value) or (json.dumps(value) if isinstance(value, bool | None) else shown(value))


def _config(settings: dict[str, Any]) -> TrainConfig | None:
    with suppress(UserError):
        return build_config(settings)
    return None  # another version wrote it, or somebody changed it by hand


def num_nodes(value: Any, most: int = MOST_NODES) -> int:
    """How many values ``value`` holds, counted as often as they stand in it; above ``most`` the counting ends.

    Example:
        >>> bomb = ["x"]
        >>> for _ in range(60):
        ...     bomb = [bomb, bomb]
        >>> num_nodes({"a": [1, 2]}), num_nodes(bomb) > MOST_NODES
        (4, True)
    """
    count, left = 0, [value]
    while left and count <= most:
        one = left.pop()
        count += 1
        left += [*one.values()] if isinstance(one, dict) else one if isinstance(one, list | tuple | set) else []
    return count


def _answers(path: Path) -> list[dict[str, str]]:
    """What the demo asked before and after."""
    loaded = parsed(read_text(path, MOST_JSON_BYTES) or "")
    rows = [row for row in loaded[:MOST_ANSWERS] if isinstance(row, dict)] if isinstance(loaded, list) else []
    names = ("question", "before", "after")
    return [
        {name: str(text(row[name])) for name in names}
        for row in rows
        if all(text(row.get(n)) is not None for n in names)
    ]


def _age(path: Path) -> float | None:
    with suppress(OSError):
        return max(0.0, round(time.time() - path.stat().st_mtime, 1))
    return None


def _stamp(path: Path) -> tuple[int, int, int] | None:
    with suppress(OSError):
        found = path.lstat()
        return found.st_mtime_ns, found.st_size, found.st_ino
    return None
