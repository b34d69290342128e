"""What MeZO as published does to weights: moved by + z, - 2 z and + z again, at no learning rate, a thousand times.

python benchmarks/probe_drift.py [--steps 1000] [--epsilon 1e-3] [--deviation 0.02]

The weights should come back each time; what is left is rounding, as a share of their norm. `lisatune.methods.mezo` calls
modules on moved copies instead, so there is nothing to come back from.
"""

from __future__ import annotations

import argparse

import torch
from results import markdown, write_page

ELEMENTS = 2**18


def drift(dtype: torch.dtype, steps: int, epsilon: float, deviation: float) -> float:
    """Norm of the error after ``steps`` probes in place, as a share of the weights' norm."""
    generator = torch.Generator().manual_seed(0)
    begun = (deviation * torch.randn(ELEMENTS, generator=generator)).to(dtype)
    weights = begun.clone()
    for _ in range(steps):
        z = torch.randn(ELEMENTS, generator=generator)
        for distance in (epsilon, -2 * epsilon, epsilon):
            weights.copy_(weights.float() + distance * z)
    return ((weights.double() - begun.double()).norm() / begun.double().norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--epsilon", type=float, default=1e-3)
    parser.add_argument("--deviation", type=float, default=0.02)
    options = parser.parse_args()
    rows = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        left = drift(dtype, options.steps, options.epsilon, options.deviation)
        rows.append([str(dtype).removeprefix("torch."), f"{100 * left:.2g}%"])
    table = markdown(["weights", "left of the probes, share of the norm"], rows)
    print(write_page("probe-drift", table, __doc__).read_text())


if __name__ == "__main__":
    main()
