"""What the processes that torchrun has started hold at most: torchrun.py's neighbour, peak_of_ranks.py CASES.json."""

import json
import sys
from pathlib import Path

import torch

from conftest import make_llama
from lisatune.config import build_config
from lisatune.distributed import gathered, joined, rank
from test_plan import WIDE, measured_peak


def main(path):
    torch.set_num_threads(1)
    with joined():
        held = []
        for case in json.loads(Path(path).read_text()):
            config = build_config({"model": "-", "data": "-", "output": "-", "dtype": "float32"} | case["settings"])
            held.append(gathered(measured_peak(config, make_llama(**WIDE), 4, 128, tuple(case["drawn"]))))
        if rank() == 0:
            Path(path).write_text(json.dumps(held))


if __name__ == "__main__":
    main(sys.argv[1])
