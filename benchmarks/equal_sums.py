"""Whether equal products give equal bits on this processor, and what it costs to make them.

python benchmarks/equal_sums.py [--rounds 3] [--steps 5] [--no-price]

First, in MKL's default mode and in the mode that ``full_determinism=true`` asks for: small and larger products with their factors
at every alignment and in every layout. Listed are the alignments at which other bits come out, and whether the layout of the
factors changes bits.

Then the price: seconds of an optimizer step, each mode in processes of its own by turns, since MKL reads its mode once in a
process; on one thread. The ratio is taken round by round, and its median quoted. The demo's step: 8 of its rows and its model's
weights. The other: a random model in the shape of SmolLM2-135M, 2 rows of 512 tokens.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from results import markdown, write_page

HERE = Path(__file__).parent
SHAPES = [
    *((1, k, 32) for k in (8, 32, 33)), *((2, k, 32) for k in (8, 32, 33)), (4, 32, 32), (8, 8, 8), (8, 32, 32), (16, 32, 32),
    (16, 16, 16), (128, 64, 1), (16, 32, 96), (32, 64, 32), (128, 64, 192), (13, 19, 17), (64, 64, 64), (128, 64, 128),
    (256, 576, 576),
]  # fmt: skip
MODES = {
    "default": ("", False),
    "MKL_CBWR=COMPATIBLE": ("COMPATIBLE", False),
    "full_determinism=true": ("COMPATIBLE", True),
}


def products() -> str:
    """What depends on alignment and layout in this process's mode."""
    import torch

    from lisatune.run.determinism import blas, uneven_products

    head, rows = ["type", "product", "starts, in bytes after a multiple of 64", "largest difference"], []
    for dtype in (torch.float32, torch.bfloat16):
        for found in uneven_products(dtype, SHAPES):
            starts = ", ".join(map(str, found.starts))
            rows.append([str(dtype).removeprefix("torch."), found, starts, f"{found.difference:.1e}"])
    table = markdown(head, rows) if rows else "No product depends on the alignment."
    shapes = "\n".join(f"- {shape}" for shape in by_layout()) or "- none"
    return f"**{blas()}**\n\n{table}\n\nProducts with other bits in other layouts (float32):\n\n{shapes}\n"


def by_layout() -> list[str]:
    """Products of which the bits depend on whether their factors are laid out by rows or by columns."""
    import torch

    from lisatune.run.determinism import placed

    random, found = torch.Generator().manual_seed(0), []
    for m, k, n in SHAPES:
        left, right = torch.randn(m, k, generator=random), torch.randn(k, n, generator=random)
        first, *others = (placed(left, a, 0) @ placed(right, b, 0) for a in (False, True) for b in (False, True))
        if not all(torch.equal(first, other) for other in others):
            found.append(f"({m}, {k}) x ({k}, {n})")
    return found


def demo_step(folder: Path, full_determinism: bool) -> Callable[[], object]:
    """The demo's run, as ``lisatune.demo`` sets it up; a call takes a step."""
    from rich.console import Console

    from lisatune.demo import HERE as DEMO
    from lisatune.demo import find_model
    from lisatune.run.build import build
    from lisatune.run.preflight import preflight
    from lisatune.run.progress import Progress
    from lisatune.settings import build_config

    config = build_config(
        {"model": find_model(), "data": str(DEMO / "train.jsonl"), "output": str(folder / "run"), "num_active": 2,
         "interval_steps": 5, "learning_rate": 1e-3, "num_train_epochs": 5, "per_device_train_batch_size": 8,
         "max_length": 128, "full_determinism": full_determinism}
    )  # fmt: skip
    run = build(config, *preflight(config), console=Console(file=io.StringIO()))
    run.learner.model.train()
    batches = run.batches(Progress())

    def step() -> object:
        number, batch, _ = next(batches)
        return run.learner.step(number, run.micro_batches(batch), batch.num_labelled)

    return step


def shape_step(folder: Path, full_determinism: bool) -> Callable[[], object]:
    """A random model in the shape of SmolLM2-135M, 2 rows of 512 tokens; a call takes a step."""
    import torch
    from transformers import AutoModelForCausalLM

    from lisatune.assemble import make_learner
    from lisatune.data.loader import Batch
    from lisatune.plan.forecast import model_config, plan_config
    from lisatune.run.determinism import be_deterministic

    if full_determinism:
        be_deterministic(torch.device("cpu"))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        model_config(str(HERE / "shapes" / "smollm2-135m.json")), dtype=torch.float32
    )
    config = plan_config({"dtype": "float32", "num_active": 2, "interval_steps": 5}, "cpu")
    learner = make_learner(config, model, torch.device("cpu"))
    learner.model.train()
    ids = torch.randint(3, 1000, (2, 512))
    batch = Batch(ids, ids.roll(-1, 1), torch.arange(512).repeat(2, 1), torch.ones_like(ids, dtype=torch.bool))
    numbers = itertools.count()
    return lambda: learner.step(next(numbers), [batch], batch.num_labelled)


STEPS = {"the demo's step": demo_step, "135M, 2 x 512 tokens": shape_step}


def time_steps(name: str, num_steps: int, full_determinism: bool) -> list[float]:
    """Median seconds of a step, by the clock and of processor time, after two to warm up."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        step = STEPS[name](Path(folder), full_determinism)
        taken = []
        for _ in range(2 + num_steps):
            clock, processor = time.perf_counter(), time.process_time()
            step()
            taken.append((time.perf_counter() - clock, time.process_time() - processor))
    return [statistics.median(column) for column in zip(*taken[2:], strict=True)]


def child(mode: str, *words: str) -> str:
    """What this script prints in a process of its own, in one of MKL's modes."""
    environment = os.environ | {
        "MKL_CBWR": mode,
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
    }
    return subprocess.run(
        [sys.executable, __file__, *words], env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def price(rounds: int, num_steps: int) -> str:
    """Table of the seconds of a step in each mode, and their ratio to the default mode."""
    head, rows = ["step", "mode", "s, by the clock", "s, processor", "ratio", "ratio, processor"], []
    for name in STEPS:
        taken: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
        for _ in range(rounds):
            for mode, (asked, deterministic) in MODES.items():
                words = ["--one", name, "--steps", str(num_steps), *(["--deterministic"] if deterministic else [])]
                taken[mode].append(json.loads(child(asked, *words)))
                print(f"{name}, {mode}: {taken[mode][-1]}", file=sys.stderr)
        for mode, seconds in taken.items():
            middle = [statistics.median(s[i] for s in seconds) for i in (0, 1)]
            pairs = list(zip(seconds, taken["default"], strict=True))
            ratio = [statistics.median(s[i] / d[i] for s, d in pairs) for i in (0, 1)]
            rows.append([name, mode, *(f"{x:.2f}" for x in (*middle, *ratio))])
    return markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--no-price", action="store_true", help="Say which products differ, and do not write a page.")
    for hidden in ("--one", "--deterministic", "--products"):  # of the processes that this one starts
        parser.add_argument(hidden, help=argparse.SUPPRESS, **({} if hidden == "--one" else {"action": "store_true"}))
    options = parser.parse_args()
    if options.products:
        print(products())
    elif options.one:
        print(json.dumps(time_steps(options.one, options.steps, options.deterministic)))
    else:
        told = "\n".join(child(mode, "--products") for mode in ("", "COMPATIBLE"))
        print(told)
        if not options.no_price:
            print(write_page("equal-sums", f"{told}\n{price(options.rounds, options.steps)}", __doc__ or ""))


if __name__ == "__main__":
    main()
