"""Task settings, checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from lisatune.settings import TrainConfig


def check_eval_tasks(config: TrainConfig) -> None:
    """Refuse tasks that there are not, or whose package is not installed."""
    if config.eval_tasks:
        from lisatune.evaluation.tasks.harness import find_tasks, task_names

        find_tasks(task_names(config.eval_tasks), data_folder(config))


def data_folder(config: TrainConfig) -> Path | None:
    """Where the data of ``eval_tasks`` are, if not on the hub."""
    return Path(config.eval_data_dir).expanduser() if config.eval_data_dir else None
