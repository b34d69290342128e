"""What people watch their runs with, by accelerate's trackers. A new one is a line in ``TRACKERS``."""

from __future__ import annotations

import importlib.util
import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lisatune.common.files import write_whole
from lisatune.errors import UserError, missing_package
from lisatune.settings import TrainConfig
from lisatune.settings.machine import PACKAGES, trackers_of

IDS = "tracker-ids.json"  # what trackers know a run by, so that a resumed one goes on there


@dataclass(frozen=True)
class Place:
    """Where a tracker writes.

    Args:
        folder: Folder of the run.
        project: Name of the project.
        name: Name of the run.
        known: What the tracker knows a resumed run by; None for a new run.
        num_steps: Steps that are done.
    """

    folder: Path
    project: str
    name: str
    known: str | None
    num_steps: int

    @property
    def own(self) -> str:
        """What we tell the tracker to know the run by."""
        return self.known or uuid.uuid4().hex


@dataclass(frozen=True)
class Tracker:
    """How accelerate's tracker is made.

    Args:
        options: What it is made with.
        id_of: What it knows the run by, once started; None if it needs nothing to go on.
    """

    options: Callable[[Place], dict[str, Any]]
    id_of: Callable[[Any], str | None] = lambda tracker: None


TRACKERS: dict[str, Tracker] = {
    "tensorboard": Tracker(
        lambda at: {
            "run_name": "tensorboard", "logging_dir": at.folder, "purge_step": at.num_steps + 1 if at.num_steps else None,
        }
    ),
    "wandb": Tracker(
        lambda at: {"run_name": at.project, "name": at.name, "id": at.own, "resume": "allow", "dir": str(at.folder)},
        lambda tracker: tracker.run.id,
    ),
    "trackio": Tracker(lambda at: {"run_name": at.project, "name": at.name, "resume": "allow"}),
    "mlflow": Tracker(
        lambda at: {"experiment_name": at.project, "run_name": at.name, "run_id": at.known},
        lambda tracker: tracker.active_run.info.run_id,
    ),
    "comet_ml": Tracker(
        lambda at: {"run_name": at.project, "experiment_key": at.own, "mode": "get_or_create"},
        lambda tracker: tracker.writer.get_key(),
    ),
    "swanlab": Tracker(
        lambda at: {
            "run_name": at.project, "experiment_name": at.name, "id": at.own, "resume": "allow", "logdir": str(at.folder / "swanlab"),
        },
        lambda tracker: tracker.init_kwargs["id"],
    ),
    "aim": Tracker(
        lambda at: {"run_name": at.name, "logging_dir": ".", "experiment": at.project, "run_hash": at.known},
        lambda tracker: tracker.writer.hash,
    ),
    "clearml": Tracker(
        lambda at: {"project_name": at.project, "task_name": at.name, "continue_last_task": at.known or False},
        lambda tracker: tracker.task.id,
    ),
    "dvclive": Tracker(
        lambda at: {"dir": str(at.folder / "dvclive"), "resume": at.num_steps > 0, "save_dvc_exp": False}
    ),
}  # fmt: skip


def check_trackers(config: TrainConfig) -> None:
    """Refuse a tracker whose package, or accelerate, is not installed; nothing is imported."""
    for name in trackers_of(config.report_to):
        for package in (PACKAGES[name], "accelerate"):
            if importlib.util.find_spec(package) is None:
                raise missing_package(package, f"report_to={name}", name)


class Trackers:
    """The trackers that ``report_to`` names, started.

    Args:
        config: Settings of the run, which they keep.
        folder: Folder of the run.
        num_steps: Steps that are done; a run that goes on is the same run for each tracker.
    Raises: UserError if one of them cannot be started.
    """

    def __init__(self, config: TrainConfig, folder: Path, num_steps: int) -> None:
        names = trackers_of(config.report_to)
        path = folder / IDS
        ids = json.loads(path.read_text(encoding="utf-8")) if num_steps and path.is_file() else {}
        self._started = {}
        for name in names:
            at = Place(folder, config.project, config.run_name or folder.name, ids.get(name), num_steps)
            self._started[name] = _start(name, at, {} if num_steps else _plain(config.model_dump()))
        ids |= {name: known for name, made in self._started.items() if (known := TRACKERS[name].id_of(made))}
        if ids:
            write_whole(path, json.dumps(ids) + "\n")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Hand the numbers of a step on."""
        for tracker in self._started.values():
            tracker.log(dict(numbers), step=step)

    def finish(self) -> None:
        """The run has ended."""
        for tracker in self._started.values():
            tracker.finish()


def _start(name: str, at: Place, settings: Mapping[str, Any]) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    try:
        PartialState()  # accelerate's trackers ask it who they are
        tracker = LOGGER_TYPE_TO_CLASS[name](**TRACKERS[name].options(at))
        tracker.main_process_only = False  # rank 0 alone comes here
        tracker.start()
        if name == "comet_ml":
            tracker.writer.set_name(at.name)
        if settings and name != "tensorboard":  # which would make a second run of them
            tracker.store_init_configuration(dict(settings))
    except Exception as error:  # each library has its own errors, and the network
        raise UserError(
            f"report_to={name}: it cannot be started ({' '.join(str(error).split())[:300]}); log in to it, or leave it out"
        ) from error
    return tracker


def _plain(settings: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Settings as trackers take them: what is nested is written as JSON, and what is not set is left out."""
    return {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for name, value in settings.items()
        if value is not None
    }
