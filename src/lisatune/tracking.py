"""The numbers of a run: a JSON line an optimizer step, and whatever people watch their runs with."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lisatune.config import TrainConfig
from lisatune.errors import missing_package


class Metrics:
    """``metrics.jsonl`` of a run, written through line by line, and copied to a tracker if one is asked for.

    Raises: UserError if the tracker's package is not installed.
    """

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._tracker = _make_tracker(config, folder)

    def write(self, **values: Any) -> None:
        """Append one object; what is None is left out."""
        values = {name: value for name, value in values.items() if value is not None}
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._tracker is not None:
            numbers = {
                name: value for name, value in values.items() if isinstance(value, int | float) and name != "step"
            }
            self._tracker(numbers, values["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()
        if self._tracker is not None:
            self._tracker(None, 0)


def check_tracker(config: TrainConfig) -> None:
    """Raise a UserError if the tracker asked for is not installed."""
    if config.log_to != "none" and importlib.util.find_spec(config.log_to) is None:
        raise missing_package(config.log_to, f"log_to={config.log_to}", config.log_to)


def _make_tracker(config: TrainConfig, folder: Path) -> Any:
    """A function of (numbers, step) that hands them on; called with None when the run ends."""
    if config.log_to == "none":
        return None
    if config.log_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder / "tensorboard")

        def to_tensorboard(numbers: dict[str, float] | None, step: int) -> None:
            if numbers is None:
                writer.close()
                return
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        return to_tensorboard
    tracker = __import__(config.log_to)  # wandb and trackio share one interface
    tracker.init(project="lisatune", name=folder.name, config=config.model_dump())

    def to_tracker(numbers: dict[str, float] | None, step: int) -> None:
        if numbers is None:
            tracker.finish()
        else:
            tracker.log(numbers, step=step)

    return to_tracker
