"""The folder of a run, which one process holds for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lisatune.common.run_folder import check_output, only_run
from lisatune.processes.collectives import rank, together


@contextmanager
def hold(folder: Path, resume: bool) -> Iterator[None]:
    """Make the run's folder and keep other runs out of it: rank 0 does so, while the others wait."""
    with ExitStack() as stack:
        with together():
            if rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(only_run(folder))
                check_output(folder, resume=resume, held=True)
        yield
