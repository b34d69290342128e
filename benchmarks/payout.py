"""Whether a last step with the momentum that is left over helps, when layers freeze.

python benchmarks/payout.py [--runs runs/payout] [--seeds 1 2] [--page]

MISA (arXiv:2511.00056) ends the interval of a layer with one more step, rate * beta1 / (1 - beta1) * m / sqrt(v): as far
as its momentum would still have moved it. The paper's LISA is run with and without this step, at three lengths of an
interval and several learning rates; a rate at the edge is widened. All seeds are run at the best rate of the first one.
Runs that have ended are kept, so the command goes on where it stopped. Needs shared/ beside the checkout.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import learning
import torch
from learning import CONTENDERS, STUDIES, Contender, Study, make_rows, pending, run_trial, table
from reproduce import MODELS
from results import write_page

import lisatune.engine
from lisatune.optim.suited import drop_state

INTERVALS = (3, 10, 20)
NAMES = {
    (interval, paid): f"K {interval}{', payout' if paid else ''}"
    for interval, paid in itertools.product(INTERVALS, (False, True))
}
MODELS_USED = {"stories260K": 4e-3, "stories15M": 3e-4}  # model: middle of its rates


@torch.no_grad()
def pay_out(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> None:
    """Take the step that is left over, then drop the state."""
    state = optimizer.state.get(parameter)
    if state:
        group = next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
        beta1, beta2 = group["betas"]
        root = (state["exp_avg_sq"] / (1 - beta2 ** state["step"].item())).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["exp_avg"], root, value=-group["lr"] * beta1 / (1 - beta1))
    drop_state(optimizer, parameter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/payout"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--page", action="store_true", help="write the page of what is there, and run nothing")
    options = parser.parse_args()
    make_rows(options.runs / "rows")
    learning.CONTENDERS = CONTENDERS | {
        name: Contender({"num_active": 2, "interval_steps": interval}, 1.0) for (interval, _), name in NAMES.items()
    }
    for model, middle in MODELS_USED.items():
        STUDIES[model] = Study(
            model, "gsm8k", 100, max_length=256, seeds=tuple(options.seeds), names=tuple(NAMES.values()), scale=middle
        )
    paid = {name for (_, is_paid), name in NAMES.items() if is_paid}
    engine: Any = lisatune.engine
    while not options.page and (trial := next(pending(list(MODELS_USED), options.runs), None)):
        engine.drop_state = pay_out if trial.contender in paid else drop_state
        print(run_trial(trial, str(MODELS[trial.study]), options.runs.resolve(), "cpu"), flush=True)
    tables = [table(model, options.runs) for model in MODELS_USED if (options.runs / model).is_dir()]
    print(write_page("payout", "\n\n".join(tables), __doc__ or ""))


if __name__ == "__main__":
    main()
