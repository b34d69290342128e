"""Train one run after the other in the processes that torchrun has started: torchrun.py CASES.json; and how to call it."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from patience import HANG_SECONDS


def torchrun(num_ranks, *words, check=True, options=(), **environment):
    """What torchrun printed; its processes are killed if they take too long, so that nothing hangs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    with subprocess.Popen(
        [*command, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            told, _ = process.communicate(timeout=HANG_SECONDS)
        finally:
            process.send_signal(signal.SIGTERM)  # torchrun ends its processes, which have sessions of their own
    assert not check or process.returncode == 0, told[-6000:]
    return told


def main(path):
    import torch
    from rich.console import Console

    from lisatune.learner import Learner
    from lisatune.plan.wire import Wire
    from lisatune.processes.collectives import rank
    from lisatune.processes.group import joined, restarted
    from lisatune.settings import build_config
    from lisatune.train import train

    torch.set_num_threads(1)
    sent: list[dict] = []
    deadly = None
    step = Learner.step

    def counted(*args):
        if args[0].device.type != "meta" and (args[1], rank()) == (deadly, 1) and not restarted():
            Path(f"{path}.killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with Wire() as wire:
            out = step(*args)
        if args[0].device.type != "meta":  # the forecast takes steps of its own
            sent.append(dict(wire.payload_bytes) | {"sent": sum(wire.sent_bytes_of.values())})
        return out

    Learner.step = counted
    with joined():
        for case in json.loads(Path(path).read_text()):
            sent.clear()
            deadly = case.pop("deadly_step", None)
            options = {name: case.pop(name) for name in ("resume", "allow_changes", "memory_bytes") if name in case}
            train(build_config(case), console=Console(file=io.StringIO()), **options)
            if rank() == 0:
                (Path(case["output"]) / "sent.json").write_text(json.dumps(sent))


if __name__ == "__main__":
    main(sys.argv[1])
