"""Which step without state learns best: a gradient's sign, or a gradient normalised in another way; and rows against columns.

python benchmarks/steps.py [--runs runs/steps] [--seeds 1 2] [--model smollm2=PATH] [--page]

Slices train, a third of each matrix in a step. Embedding and head train whole by the sign at 0.3 of the rate, whatever step the
hidden matrices take. One contender trains a third of the columns in place of rows. Each step has a root mean square of 1, so
learning rates mean the same. Each has five rates, and more where the best one is at the edge. The other seeds run at the
best rate. Runs that have ended are kept, so the command goes on where it stopped. Weights are float32. Needs shared/ beside
the checkout. SmolLM2 is tried where its path is given, with slices of a fifteenth.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import learning
import torch
from learning import (
    CONTENDERS,
    STUDIES,
    Contender,
    Study,
    make_rows,
    pending,
    run_trial,
    slices,
    table,
    whole_vocabulary,
)
from reproduce import MODELS, unpacked
from results import write_page
from torch import Tensor

from lisatune.memory.blocks import block_range
from lisatune.optim import OPTIMS, adamw
from lisatune.optim.spectral import spectral_step

Step = Callable[[Tensor], Tensor]
STEPS: dict[str, Step] = {
    "sign": lambda g: g.sign(),
    "rows and columns by turns, five times": lambda g: both_normalised(g),
    "spectral": spectral_step,
    "each row normalised": lambda g: normalised(g, 1),
    "each column normalised": lambda g: normalised(g, 0),
    "the matrix normalised": lambda g: normalised(g, (0, 1)),
    "root of each element, normalised": lambda g: normalised(g.sign() * g.abs().sqrt(), (0, 1)),
}
COLUMNS = "sign, columns in place of rows"
MIDDLES = {"stories15M": 5e-4, "stories260K": 5e-3, "smollm2": 1e-3}


def normalised(gradient: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """``gradient`` with a root mean square of 1 along ``dim``; zero where it is zero."""
    return gradient / gradient.square().mean(dim, keepdim=True).sqrt().clamp(min=1e-30)


def both_normalised(gradient: Tensor) -> Tensor:
    """Rows and columns with a root mean square near 1 (SinkGD, arXiv:2502.06742)."""
    for _ in range(5):
        gradient = normalised(normalised(gradient, 1), 0)
    return gradient


def num_matrices(model: Path) -> int:
    """Of a model of Llama's kind: seven in each decoder layer."""
    return 7 * int(json.loads((model / "config.json").read_text())["num_hidden_layers"])


class OfColumns:
    """The sign in a third of the columns, another third in each step; each matrix has its own order, without replacement."""

    def __init__(self, num_matrices: int, parts: int) -> None:
        self.num_matrices, self.parts, self.calls = num_matrices, parts, 0

    def __call__(self, gradient: Tensor) -> Tensor:
        """The step of the next matrix."""
        step, matrix = divmod(self.calls, self.num_matrices)
        self.calls += 1
        sweep, turn = divmod(step, self.parts)
        block = random.Random(f"{sweep} {matrix}").sample(range(self.parts), self.parts)[turn]
        start, stop = block_range(gradient.shape[1], self.parts, block)
        taken = torch.zeros_like(gradient)
        taken[:, start:stop] = gradient[:, start:stop].sign()
        return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/steps"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--model", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--page", action="store_true", help="write the page of what is there, and run nothing")
    options = parser.parse_args()
    make_rows(options.runs / "rows")
    given = {name: Path(path) for name, _, path in (word.partition("=") for word in options.model)}
    given = {name: MODELS[name] for name in ("stories260K", "stories15M")} | given
    models = {name: unpacked(path, options.runs).resolve() for name, path in given.items()}
    taken: Step = spectral_step
    OPTIMS["spectral"] = replace(OPTIMS["spectral"], factored=False, stateless=True)  # of the bare gradient
    plain: Any = adamw
    plain.spectral_step = lambda gradient: taken(gradient)
    small = slices(3, optim="spectral", **whole_vocabulary(0.3))
    for model in models:
        settings = small | ({"num_slices": 15} if model == "smollm2" else {})
        whole = {"method": "full", "optim": "spectral", "embedding_lr_ratio": 0.3}
        learning.CONTENDERS = CONTENDERS | {name: Contender(settings, 1.0) for name in STEPS}
        learning.CONTENDERS[COLUMNS] = Contender(whole, 1.0)
        STUDIES[model] = Study(
            model, "gsm8k", 40 if model == "smollm2" else 100, max_length=192 if model == "smollm2" else 256,
            seeds=tuple(options.seeds), names=(COLUMNS, *STEPS), scale=MIDDLES[model],
        )  # fmt: skip
        while not options.page and (trial := next(pending([model], options.runs), None)):
            taken = STEPS.get(trial.contender) or OfColumns(num_matrices(models[model]), settings["num_slices"])
            print(run_trial(trial, str(models[model]), options.runs.resolve(), "cpu"), flush=True)
    print(write_page("steps", "\n\n".join(table(model, options.runs) for model in models), __doc__ or ""))


if __name__ == "__main__":
    main()
