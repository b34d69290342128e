"""What a backward pass that ends early is worth: which layers are drawn, the time of a step, and the held-out loss.

python benchmarks/backward_stop.py [--steps 60] [--seeds 0 1 2] [--runs runs/backward-stop]

Needs stories15M and GSM8K in shared/ beside the checkout. The embedding is frozen, so the backward pass ends at the lowest
active layer. Four ways of drawing are compared with layers drawn evenly, two at a time: neighbours, a bias to deep layers,
one layer at a time, and embedding trained. Each has its own best of four learning rates, by the first seed. Processor time is compared, since the machine
may do other work. Runs that have ended are kept, so the command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
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

FROZEN = {"recipe": "paper", "interval_steps": 3, "num_active": 2, "train_embedding": False, "train_head": False}
DEEP = {"sampler": "weighted", "sampler_options": {"weights": [1, 2, 3, 4, 5, 6]}}
WAYS: dict[str, dict[str, Any]] = {
    "two layers, evenly": FROZEN,
    "two neighbours, from the top down": FROZEN | {"sampler": "round_robin", "sampler_options": {"descending": True}},
    "two layers, deep ones more often": FROZEN | DEEP,
    "one layer, evenly": FROZEN | {"num_active": 1},
    "one layer, deep ones more often": FROZEN | DEEP | {"num_active": 1},
    "two layers, embedding and head train": FROZEN | {"train_embedding": True, "train_head": True},
}
RATES = (6e-5, 1.2e-4, 2.4e-4, 4.8e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/backward-stop"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    make_rows(options.runs / "rows")
    first = options.seeds[0]
    best: dict[str, float] = {}
    found: dict[str, list[dict[str, float]]] = {}
    for name in WAYS:
        losses = {rate: one_run(options, name, rate, first)["loss"] for rate in RATES}
        best[name] = min(losses, key=losses.__getitem__)
    for seed in options.seeds:
        for name in WAYS:  # by turns
            found.setdefault(name, []).append(one_run(options, name, best[name], seed))
    rows = []
    base = found["two layers, evenly"]
    for name, runs in found.items():
        loss = interval([run["loss"] for run in runs])
        ratio = sum(run["seconds"] for run in runs) / sum(run["seconds"] for run in base)
        spread = "" if loss["high"] is None else f" ± {loss['high'] - loss['mean']:.3f}"
        at_edge = " (edge)" if best[name] in (RATES[0], RATES[-1]) else ""
        rows.append([name, f"{best[name]:g}{at_edge}", f"{ratio:.2f}", f"{loss['mean']:.3f}{spread}"])
    about = (
        f"stories15M, GSM8K, {options.steps} steps of 2 rows of at most 256 tokens, a draw every 3 steps, seeds "
        f"{', '.join(map(str, options.seeds))}, one thread. Time is that of a step, against two layers drawn evenly."
    )
    head = ["what trains", "best rate", "time of a step", "held-out loss"]
    print(write_page("backward-stop", f"{about}\n\n{markdown(head, rows)}", __doc__ or ""))


def one_run(options: Any, name: str, rate: float, seed: int) -> dict[str, float]:
    """Processor seconds of a step, and the held-out loss after training; kept in a file."""
    kept = options.runs / f"{list(WAYS).index(name)}-{rate:g}-{seed}-{options.steps}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    model = unpacked(MODELS["stories15M"], options.runs).resolve()
    folder, rows = Path(tempfile.mkdtemp()), options.runs / "rows"
    config = build_config(
        {"model": str(model), "data": str(rows / "gsm8k.jsonl"), "eval_data": str(rows / "gsm8k.held_out.jsonl"),
         "output": str(folder / "run"), "max_steps": options.steps, "warmup_steps": 5, "per_device_train_batch_size": 2,
         "max_length": 256, "learning_rate": rate, "seed": seed, "device": "cpu", "save_minutes": 1e6} | WAYS[name]
    )  # fmt: skip
    console, seconds = Console(quiet=True), []
    run = build(config, *preflight(config), console=console)
    step = run.step

    def timed(*args: Any) -> Any:
        begun = time.process_time()
        outcome = step(*args)
        seconds.append(time.process_time() - begun)
        return outcome

    run.step = timed  # type: ignore[method-assign]
    summary = train_built(run, console=console)
    shutil.rmtree(folder)
    result = {"seconds": sum(seconds) / len(seconds), "loss": summary["eval_loss_after"]}
    kept.write_text(json.dumps(result))
    print(name, rate, seed, result, flush=True)
    return result


if __name__ == "__main__":
    main()
