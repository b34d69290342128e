"""What padding costs: rows as they come, rows of like length together, and packed rows.

python benchmarks/padding.py [--steps 60] [--seeds 0 1 2]

Needs stories15M, Dolly and GSM8K in shared/ beside the checkout. Each run learns from 8 rows of at most 256 tokens a step, with
the settings of `lisatune train`. Packed rows hold more tokens, so a step with them takes longer and learns more. Ways
take turns, and processor time is compared, since the machine may do other work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from learning import make_rows
from reproduce import MODELS, unpacked
from results import markdown, write_page
from rich.console import Console

from lisatune.compare.results import interval
from lisatune.run.build import build
from lisatune.run.preflight import preflight
from lisatune.settings import build_config
from lisatune.train import train_built

WAYS = {"as they come": {}, "`group_by_length=true`": {"group_by_length": True}, "`packing=true`": {"packing": True}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_rows(Path(folder) / "rows")
        model = unpacked(MODELS["stories15M"], Path(folder)).resolve()
        for data in ("dolly", "gsm8k"):
            found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
            for seed in options.seeds:
                for name, settings in WAYS.items():
                    found[name].append(train_one(model, Path(folder), data, seed, options.steps, settings))
                    print(data, seed, name, json.dumps(found[name][-1]), flush=True)
            for name, runs in found.items():
                mean = {key: statistics.fmean(one[key] for one in runs) for key in runs[0]}
                loss = interval([one["loss"] for one in runs])
                spread = "" if loss["high"] is None else f" ± {loss['high'] - loss['mean']:.3f}"
                rows.append([data, name, f"{mean['padding']:.0%}", f"{mean['tokens']:,.0f}", f"{mean['seconds']:.3f}",
                             f"{1e6 * mean['seconds'] / mean['tokens']:.0f}", f"{loss['mean']:.3f}{spread}"])  # fmt: skip
    head = ["rows", "way", "padding", "tokens a step", "processor s a step", "processor µs a token", "held-out loss"]
    about = f"stories15M, {options.steps} steps, seeds {', '.join(map(str, options.seeds))}, one thread."
    print(write_page("padding", f"{about}\n\n{markdown(head, rows)}", __doc__ or ""))


def train_one(
    model: Path, folder: Path, data: str, seed: int, steps: int, settings: dict[str, bool]
) -> dict[str, float]:
    """Train; the share of padding, tokens and processor seconds of a step, and the held-out loss after it."""
    rows, output = folder / "rows", Path(tempfile.mkdtemp(dir=folder)) / "run"
    config = build_config(
        {"model": str(model), "data": str(rows / f"{data}.jsonl"), "eval_data": str(rows / f"{data}.held_out.jsonl"),
         "output": str(output), "max_steps": steps, "warmup_steps": min(5, steps - 1), "per_device_train_batch_size": 8, "max_length": 256,
         "learning_rate": 1e-3, "seed": seed, "device": "cpu", "save_minutes": 1e6} | settings
    )  # fmt: skip
    console, seconds = Console(quiet=True), 0.0
    run = build(config, *preflight(config), console=console)
    step = run.step

    def timed(*args: Any) -> Any:
        nonlocal seconds
        begun = time.process_time()
        outcome = step(*args)
        seconds += time.process_time() - begun
        return outcome

    run.step = timed  # type: ignore[method-assign]
    summary = train_built(run, console=console)
    return {
        "padding": summary["padding_share"], "tokens": summary["tokens"] / steps, "seconds": seconds / steps,
        "loss": summary["eval_loss_after"],
    }  # fmt: skip


if __name__ == "__main__":
    main()
