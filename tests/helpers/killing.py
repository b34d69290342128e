"""Train a run to its end although it is killed so many times; python killing.py MODEL DATA FOLDER KILLS.

Of five kills one comes soon after the start, two while a checkpoint is written, and two at some time after one was.
"""

import io
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from lisatune.common.run_folder import checkpoint_steps
from lisatune.run.build import Run, build
from lisatune.run.preflight import preflight
from lisatune.settings import build_config
from lisatune.train import train_built
from patience import wait_until

SETTINGS = {
    "num_active": 1, "interval_steps": 3, "save_steps": 1, "max_steps": 150, "learning_rate": 0.3, "max_length": 64,
    "per_device_train_batch_size": 4, "eval_rows": 6, "packing": True, "eval_steps": 10, "keep_best": True,
    "lr_scheduler_type": "constant",
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
        train_built(run, console=Console(file=io.StringIO()), resume=True)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)


def newest(output: Path) -> int:
    """Step of the newest checkpoint; 0 if there is none."""
    return (checkpoint_steps(output) or [0])[0] if output.exists() else 0


def is_writing(output: Path) -> bool:
    """Whether a checkpoint is half written."""
    return any((output / "checkpoints").glob(".writing-*"))


def caught_writing(child: int, output: Path) -> bool:
    """Stop ``child`` for a moment if it seems to be writing; whether it is, and stays stopped."""
    if not is_writing(output):
        return False
    os.kill(child, signal.SIGSTOP)
    os.waitid(os.P_PID, child, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    if is_writing(output):
        return True
    os.kill(child, signal.SIGCONT)
    return False


def kill(child: int, output: Path, way: int, moments: random.Random, per_step: float) -> bool:
    """Kill ``child`` in one of five ways; False if the run had come to its end before."""
    before = newest(output)
    if way:
        wait_until(lambda: newest(output) > before or ended(child), pause=0.0005)
    if way in (1, 2):
        wait_until(lambda: ended(child) or caught_writing(child, output), pause=0.0005)
    else:
        time.sleep(moments.uniform(0, 2 * per_step))
    if ended(child):
        assert os.waitpid(child, 0)[1] == 0
        return False
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def ended(child: int) -> bool:
    """Whether ``child`` has ended; it stays to be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def main(model: str, data: str, folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    begun = time.monotonic()
    assert os.waitpid(start(make(model, data, folder / "straight")), 0)[1] == 0
    per_step = (time.monotonic() - begun) / SETTINGS["max_steps"]
    moments = random.Random(0)
    output = folder / "killed"
    run, told = make(model, data, output), {"kills": 0, "while_writing": 0, "went_on": 0}
    while told["kills"] < kills:
        before = newest(output)
        if not kill(start(run), output, told["kills"] % 5, moments, per_step):
            shutil.rmtree(output)  # it was faster than we: there is nothing left to kill, so it begins once more
            continue
        told["kills"] += 1
        told["while_writing"] += is_writing(output)
        told["went_on"] += newest(output) > before
    assert os.waitpid(start(run), 0)[1] == 0
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
