"""The numbers of a run: a JSON line an optimizer step, and whatever people watch their runs with."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lisatune.common.lines import drop_later_lines, step_of
from lisatune.processes.collectives import rank
from lisatune.run.trackers import Trackers
from lisatune.settings import TrainConfig
from lisatune.settings.machine import trackers_of


class Metrics:
    """``metrics.jsonl`` of a run, written through line by line, and handed to the trackers that are asked for; by rank 0 alone.

    Args:
        config: Settings of the run, which name the trackers.
        folder: Folder of the run.
        num_steps: Steps that are done; lines of later ones, which a resumed run takes again, are dropped.
    Raises: UserError if a tracker cannot be started.
    """

    def __init__(self, config: TrainConfig, folder: Path, num_steps: int = 0) -> None:
        path = folder / "metrics.jsonl" if rank() == 0 else Path(os.devnull)
        drop_later_lines(path, num_steps, step_of=step_of)
        wanted = rank() == 0 and trackers_of(config.report_to)
        self._trackers = Trackers(config, folder, num_steps) if wanted else None
        self._file = path.open("a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        """Append one object; what is None or, as JSON knows neither, NaN or infinite is left out."""
        left_out = [n for n, v in values.items() if v is None or (isinstance(v, float) and not math.isfinite(v))]
        values = {name: value for name, value in values.items() if name not in left_out}
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._trackers is not None:
            numbers = {
                name: value for name, value in values.items() if isinstance(value, int | float) and name != "step"
            }
            numbers |= {f"scores/{task}": value for task, value in values.get("scores", {}).items()}
            self._trackers.log(numbers, values["step"])

    def sync(self) -> None:
        """Wait until all lines are on the disk; a checkpoint relies on them."""
        if rank() == 0:
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()
        if self._trackers is not None:
            self._trackers.finish()
