"""Runs of a task, one after the other, in the processes that torchrun has started: tasks_in_processes.py CASES.json"""

import io
import json
import signal
import sys
from pathlib import Path

import torch
from rich.console import Console

from lisatune.errors import Stopped, UserError
from lisatune.preferences.journal import TaskJournal
from lisatune.processes.collectives import rank
from lisatune.processes.group import joined
from lisatune.settings import build_config
from lisatune.train import train

begin = TaskJournal.on_step_begin


def run(case):
    """Train; leave what was told, also of a mistake and of a stop, which a signal to the last process asks for."""
    stopped_after, resume = case.pop("stopped_after", None), case.pop("resume", False)

    def signalled(self, args, state, control, **kwargs):
        if state.global_step + 1 == stopped_after and rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        begin(self, args, state, control, **kwargs)

    TaskJournal.on_step_begin = signalled
    console = Console(file=io.StringIO(), width=500)
    try:
        train(build_config(case), console=console, resume=resume)
    except (Stopped, UserError) as error:
        console.print(str(error))
    except SystemExit:  # of another process than rank 0, which tells the mistake
        pass
    if rank() == 0:
        with Path(case["output"] + ".told").open("a") as file:
            file.write(console.file.getvalue())


def main(path):
    torch.set_num_threads(1)
    with joined():
        for case in json.loads(Path(path).read_text()):
            run(case)


if __name__ == "__main__":
    main(sys.argv[1])
