"""``lisatune``, but one step of the training waits until a signal comes: python held.py STEP WORD..."""

import os
import signal
import sys

from lisatune.cli import main
from lisatune.run.build import Run
from steps import before_each_step


def hold(held_step):
    """Let ``train`` wait at the beginning of ``held_step``, counted from 0, for a signal; one that came before counts too."""
    arrived, arriving = os.pipe()
    os.set_blocking(arriving, False)
    signal.set_wakeup_fd(arriving)  # a byte for each signal

    def wait(step):
        if step == held_step:
            os.read(arrived, 1)

    Run.batches = before_each_step(wait)


if __name__ == "__main__":
    hold(int(sys.argv.pop(1)))
    main()
