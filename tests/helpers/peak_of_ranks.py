"""What the processes that torchrun has started hold at most: torchrun.py's neighbour, peak_of_ranks.py CASES.json."""

import json
import sys
from pathlib import Path

import torch

from lisatune.processes.collectives import gathered, rank
from lisatune.processes.group import joined
from lisatune.settings import build_config
from patience import wait_until
from peaks import WIDE, measured_peak
from tiny import make_llama


def settled(collective):
    """The collective, whose buffers the calling thread is the last to let go of.

    Gloo works in threads of its own, and the profiler does not see what is freed there: about every third step seemed
    to keep a gradient for good.
    """

    def call(*args, async_op=False, **kwargs):
        if async_op:
            return collective(*args, async_op=True, **kwargs)
        work = collective(*args, async_op=True, **kwargs)
        work.wait()
        wait_until(gloo_sleeps, pause=0.001)
        del work  # with its buffers, which nobody else holds any more
        return None

    return call


def threads_of_gloo():
    """The folders of the threads in which Gloo works."""
    return [task for task in Path("/proc/self/task").iterdir() if "gloo_runloop" in (task / "comm").read_text()]


def gloo_sleeps():
    """Whether all threads in which Gloo works wait for more to do, as the system says."""
    tasks = threads_of_gloo()
    assert tasks
    return all((task / "stat").read_text().rpartition(")")[2].split()[0] == "S" for task in tasks)


def main(path):
    torch.set_num_threads(1)
    collectives = ("all_gather_single", "reduce_scatter_single", "all_gather_into_tensor", "reduce_scatter_tensor")
    for name in (*collectives, "all_reduce"):
        if hasattr(torch.distributed, name):  # FSDP2 calls the first two, before PyTorch 2.13 the next two
            setattr(torch.distributed, name, settled(getattr(torch.distributed, name)))
    with joined():
        held = []
        for case in json.loads(Path(path).read_text()):
            config = build_config({"model": "-", "data": "-", "output": "-", "dtype": "float32"} | case["settings"])
            held.append(gathered(measured_peak(config, make_llama(**WIDE), 4, 128, tuple(case["drawn"]))))
        if rank() == 0:
            Path(path).write_text(json.dumps(held))
    assert not threads_of_gloo(), "one that works when Python ends may abort the process"


if __name__ == "__main__":
    main(sys.argv[1])
