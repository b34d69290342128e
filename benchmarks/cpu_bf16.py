"""bfloat16 on a CPU that multiplies it: time of a step against float32, by turns, and the held-out loss after training.

python benchmarks/cpu_bf16.py [--cases NAME ...] [--seeds 0 1] [--smol DIR] [--keep FILE]

Both runs of a pair are in one process and take their steps by turns, with the same rows, sampled parts and seed. Seconds
are those of the process on one core, so other work on the machine counts little. The loss is that of the whole run, not
of its first steps. float32 is multiplied as lisatune does it by default, without full_determinism. With --keep, finished
pairs are kept in FILE, and the command goes on where it stopped.

Needs shared/models/stories15M and shared/data/dolly, and with --smol a folder with SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from results import SHARED, markdown, write_page
from rich.console import Console

from lisatune.demo import SETTINGS as DEMO
from lisatune.run.build import Run, build
from lisatune.run.preflight import preflight
from lisatune.run.progress import Progress
from lisatune.run.schedule import make_schedule, seed_step, set_learning_rate
from lisatune.settings import build_config

STORIES = str(SHARED / "models/stories15M/hf")
TYPES = ("float32", "bfloat16")
DOLLY = {"per_device_train_batch_size": 4, "max_length": 192, "warmup_steps": 5}
WHOLE = {"recipe": "paper", "learning_rate": 2e-4}
# the model ("smol" for --smol), settings, steps
CASES: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "stories15M, demo": (STORIES, DEMO, None),
    "stories15M, dolly": (STORIES, DOLLY | {"learning_rate": 1e-3}, 100),
    "stories15M, dolly, `recipe=paper`": (STORIES, DOLLY | WHOLE, 100),
    "SmolLM2-135M, demo": ("smol", DEMO, None),
    "SmolLM2-135M, dolly": ("smol", DOLLY | {"learning_rate": 1e-3}, 40),
}


def dolly(folder: Path) -> dict[str, str]:
    """Rows to train on, and 64 held out, as files in ``folder``."""
    with gzip.open(SHARED / "data/dolly/dolly_3k.json.gz", "rt", encoding="utf-8") as file:
        text = file.read()
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    files = {"data": rows[64:], "eval_data": rows[:64]}
    for name, part in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in files}


def built(model: str, settings: dict[str, Any], folder: Path) -> Run:
    """A run that is ready for its first step."""
    config = build_config(settings | {"model": model, "output": str(folder)})
    return build(config, *preflight(config), console=Console(quiet=True))


def pair(runs: dict[str, Run], seed: int) -> tuple[dict[str, list[float]], dict[str, float], dict[str, float]]:
    """Train ``runs`` to their end by turns: seconds of each step, held-out losses before and after."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    before = {name: statistics.mean(run.held_out_losses().values()) for name, run in runs.items()}
    steps = {name: run.batches(Progress()) for name, run in runs.items()}
    rates = {name: make_schedule(run.config, run.data.num_steps) for name, run in runs.items()}
    for number in range(next(iter(runs.values())).data.num_steps):
        for name, run in runs.items():
            run.learner.model.train()
            _, batch, _ = next(steps[name])
            seed_step(seed, number)
            set_learning_rate(run.learner.optimizer, rates[name](number))
            begun = time.process_time()
            run.learner.step(number, run.micro_batches(batch), batch.num_labelled)
            seconds[name].append(time.process_time() - begun)
    return seconds, before, {name: statistics.mean(run.held_out_losses().values()) for name, run in runs.items()}


def measure(options: argparse.Namespace) -> str:
    """Tables of all cases."""
    kept = options.keep.read_text(encoding="utf-8").splitlines() if options.keep and options.keep.exists() else []
    rows: list[list[object]] = [json.loads(line) for line in kept]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = dolly(folder)
        for seed, case in itertools.product(options.seeds, options.cases or CASES):
            model, settings, steps = CASES[case]
            if (model == "smol" and options.smol is None) or [case, seed] in [row[:2] for row in rows]:
                continue
            more = {"seed": seed} | ({} if steps is None else data | {"max_steps": steps})
            place = folder / str(len(rows))
            runs = {
                kind: built(options.smol if model == "smol" else model, settings | more | {"dtype": kind}, place / kind)
                for kind in TYPES
            }
            seconds, before, after = pair(runs, seed)
            ratios = [b / a for a, b in zip(*(seconds[kind][2:] for kind in TYPES), strict=True)]
            quarter = statistics.quantiles(ratios, n=4)
            rows.append([
                case, seed, len(ratios) + 2, *(f"{statistics.median(seconds[kind]):.3f}" for kind in TYPES),
                f"{statistics.median(ratios):.2f} ({quarter[0]:.2f} to {quarter[2]:.2f})", f"{before['float32']:.4f}",
                *(f"{after[kind]:.4f}" for kind in TYPES), f"{after['bfloat16'] - after['float32']:+.4f}",
            ])  # fmt: skip
            print(*rows[-1], sep=" | ", flush=True)
            if options.keep:
                with options.keep.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    rows.sort(key=lambda row: list(CASES).index(str(row[0])))
    head = ["case", "seed", "steps", "s/step, float32", "bfloat16", "ratio, median (quartiles)", "loss before",
            "after, float32", "after, bfloat16", "difference"]  # fmt: skip
    return markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=list(CASES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--smol", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--keep", type=Path, help="file of finished pairs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(write_page("cpu-bf16", measure(options), __doc__ or ""))


if __name__ == "__main__":
    main()
