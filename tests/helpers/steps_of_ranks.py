"""Optimizer steps with every lever in the processes that torchrun has started: steps_of_ranks.py CASES.json WEIGHTS.pt."""

import json
import sys
from pathlib import Path

import torch

from lever_steps import run
from lisatune.processes.collectives import gathered, rank
from lisatune.processes.group import joined


def main(cases, results):
    torch.set_num_threads(1)
    with joined():
        found = {}
        for name, case in json.loads(Path(cases).read_text()).items():
            weights, told = run(**case)
            sums = gathered(sum(p.double().sum().item() for p in weights.values()))
            found[name] = {"weights": weights, "told": told, "alike": len(set(sums)) == 1}
        if rank() == 0:
            torch.save(found, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
