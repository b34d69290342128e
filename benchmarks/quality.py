"""Held-out loss before and after, for each method on each data set; one process a run, finished runs are not repeated.

python benchmarks/quality.py --model MODEL --gsm8k train.jsonl.gz --alpaca alpaca.jsonl.gz --runs runs/quality

Each method has a learning rate of its own, not searched for: this shows that all of them learn, and what they hold; it
does not rank them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from results import write_page

RATES = {"lisa": 1e-4, "lora": 5e-4, "full": 5e-5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--model", "--gsm8k", "--alpaca"):
        parser.add_argument(name, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    lines = [
        "| data | method | learning rate | held-out loss before | after | tokens | s, evaluation included | peak GiB "
        "| optimizer state MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for data, file in {"gsm8k": options.gsm8k, "alpaca": options.alpaca}.items():
        for method, rate in RATES.items():
            folder = options.runs / f"{data}-{method}"
            if not (folder / "summary.json").exists():
                subprocess.run(
                    [sys.executable, "-m", "lisatune", "train", "--model", options.model, "--data", file,
                     "--output", str(folder), f"method={method}", f"learning_rate={rate}", f"max_steps={options.steps}",
                     "max_length=256", "per_device_train_batch_size=8", "eval_rows=96", "warmup_steps=5", "seed=0"],
                    check=True,
                )  # fmt: skip
            s = json.loads((folder / "summary.json").read_text())
            lines.append(
                f"| {data} | {method} | {rate:g} | {s['eval_loss_before']:.4f} | {s['eval_loss_after']:.4f} "
                f"| {s['tokens']:,} | {s['train_seconds']:.0f} | {s['peak_bytes'] / 2**30:.2f} "
                f"| {s['state_bytes'] / 2**20:.1f} |"
            )
    print(write_page("quality", "\n".join(lines), __doc__ or ""))


if __name__ == "__main__":
    main()
