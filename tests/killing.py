"""Train a run to its end although it is killed so many times; python killing.py MODEL DATA FOLDER KILLS."""

import io
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from lisatune.config import build_config
from lisatune.files import checkpoint_steps
from lisatune.preflight import preflight
from lisatune.run import Run, build
from lisatune.train import fit

SETTINGS = {
    "num_active": 1, "interval_steps": 3, "save_steps": 1, "max_steps": 150, "learning_rate": 1e-2, "max_length": 64,
    "per_device_train_batch_size": 4, "eval_rows": 6, "packing": True,
}  # fmt: skip


def make(model: str, data: str, output: Path) -> Run:
    """A run that has not begun; each child gets a copy of it, as if it had been built there."""
    config = build_config(SETTINGS | {"model": model, "data": data, "output": str(output)})
    return build(config, *preflight(config), console=Console(file=io.StringIO()))


def start(run: Run) -> int:
    """A child that trains; its process number."""
    child = os.fork()
    if child:
        return child
    try:
        fit(run, console=Console(file=io.StringIO()), resume=True)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)


def main(model: str, data: str, folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    begun = time.monotonic()
    assert os.waitpid(start(make(model, data, folder / "straight")), 0)[1] == 0
    per_step = (time.monotonic() - begun) / SETTINGS["max_steps"]
    moments = random.Random(0)
    output = folder / "killed"
    run, told = make(model, data, output), {"kills": 0, "while_writing": 0, "went_on": 0}
    while told["kills"] < kills:
        before = (checkpoint_steps(output) or [0])[0] if output.exists() else 0
        child = start(run)
        if moments.random() < 0.8 and before < SETTINGS["max_steps"] - 20:  # most die in the loop, some before it
            while not output.exists() or (checkpoint_steps(output) or [0])[0] <= before:
                assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended by itself"
                time.sleep(0.0005)
        time.sleep(moments.uniform(0, 2 * per_step))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the run ended before it was killed"
        told["kills"] += 1
        if output.exists():
            told["while_writing"] += any((output / "checkpoints").glob(".writing-*"))
            told["went_on"] += (checkpoint_steps(output) or [0])[0] > before
    assert os.waitpid(start(run), 0)[1] == 0
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
