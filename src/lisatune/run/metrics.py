"""The numbers of a run: a JSON line an optimizer step, and whatever people watch their runs with."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lisatune.common.files import write_whole
from lisatune.common.lines import drop_later_lines, step_of
from lisatune.errors import missing_package
from lisatune.processes.collectives import rank
from lisatune.settings import TrainConfig


class Metrics:
    """``metrics.jsonl`` of a run, written through line by line, and copied to a tracker if one is asked for; by rank 0 alone.

    Args:
        config: Settings of the run, which name the tracker.
        folder: Folder of the run.
        num_steps: Steps that are done; lines of later ones, which a resumed run takes again, are dropped.
    Raises: UserError if the tracker's package is not installed.
    """

    def __init__(self, config: TrainConfig, folder: Path, num_steps: int = 0) -> None:
        path = folder / "metrics.jsonl" if rank() == 0 else Path(os.devnull)
        drop_later_lines(path, num_steps, step_of=step_of)
        self._file = path.open("a", encoding="utf-8")
        self._tracker = _make_tracker(config, folder, num_steps) if rank() == 0 else None

    def write(self, **values: Any) -> None:
        """Append one object; what is None or, as JSON knows neither, NaN or infinite is left out."""
        left_out = [n for n, v in values.items() if v is None or (isinstance(v, float) and not math.isfinite(v))]
        values = {name: value for name, value in values.items() if name not in left_out}
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._tracker is not None:
            numbers = {
                name: value for name, value in values.items() if isinstance(value, int | float) and name != "step"
            }
            numbers |= {f"scores/{task}": value for task, value in values.get("scores", {}).items()}
            self._tracker(numbers, values["step"])

    def sync(self) -> None:
        """Wait until all lines are on the disk; a checkpoint relies on them."""
        if rank() == 0:
            os.fsync(self._file.fileno())

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


def _make_tracker(config: TrainConfig, folder: Path, num_steps: int) -> Any:
    """A function of (numbers, step) that hands them on; called with None when the run ends."""
    if config.log_to == "none":
        return None
    if config.log_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder / "tensorboard", purge_step=num_steps + 1 if num_steps else None)

        def to_tensorboard(numbers: dict[str, float] | None, step: int) -> None:
            if numbers is None:
                writer.close()
                return
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        return to_tensorboard
    tracker = __import__(config.log_to)  # wandb and trackio share one interface
    resume: dict[str, Any] = {"resume": "allow"} if num_steps else {}
    if config.log_to == "wandb":
        resume["id"] = _wandb_id(folder)
    tracker.init(project="lisatune", name=folder.name, config=config.model_dump(), **resume)

    def to_tracker(numbers: dict[str, float] | None, step: int) -> None:
        if numbers is None:
            tracker.finish()
        else:
            tracker.log(numbers, step=step)

    return to_tracker


def _wandb_id(folder: Path) -> str:
    """What wandb knows the run by, when it is resumed too."""
    path = folder / "wandb-id.txt"
    if not path.exists():
        write_whole(path, uuid.uuid4().hex[:12])
    return path.read_text(encoding="utf-8").strip()
