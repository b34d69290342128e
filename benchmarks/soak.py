"""One long run on a real model: memory, optimizer bytes, open files and step time from start to end.

python benchmarks/soak.py [--steps 5200] [--interval-steps 20] [--frozen-bits 8] [--model stories15M]

Needs the model, stories15M or stories260K, and TinyStories in shared/ beside the checkout. The run is a process of its own, as a user starts it; its
resident memory, open files and processor time are read from outside, once a second. On a machine that does other work the
time of a step tells of that work too; its processor time does so less.

With ``--frozen-bits`` frozen layers are computed from copies in 8 or 4 bits, made again at each switch. Two of the
layers are never drawn. SHA-256 tells whether their exact weights, after all switches, are those that the run began with.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import SHARED, markdown, write_page
from safetensors import safe_open

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5200)
    parser.add_argument("--interval-steps", type=int, default=20)
    parser.add_argument("--frozen-bits", type=int, choices=(4, 8))
    parser.add_argument("--model", default="stories15M", choices=("stories15M", "stories260K"))
    options = parser.parse_args()
    model, stories = SHARED / f"models/{options.model}/hf", SHARED / "data/tinystories/tinystories_10k.txt.gz"
    if not stories.is_file():
        sys.exit(f"{stories} is not here: put the model and TinyStories beside the checkout")
    num_layers: int = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as folder:
        data, output = Path(folder) / "rows.jsonl", Path(folder) / "run"
        text = gzip.decompress(stories.read_bytes()).decode("utf-8")
        rows = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
        data.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
        words = [
            sys.executable, "-m", "lisatune", "train", "--model", str(model), "--data", str(data), "--output", str(output),
            f"max_steps={options.steps}", f"interval_steps={options.interval_steps}", "num_active=2", "max_length=64",
            "per_device_train_batch_size=1", "learning_rate=1e-4", "eval_rows=50", "save_steps=100", "packing=true",
        ]  # fmt: skip
        if options.frozen_bits:
            weights = [1] * (num_layers - 2) + [0, 0]  # the last two layers stay frozen
            words += [f"frozen_bits={options.frozen_bits}", "gradient_checkpointing=true"]
            words += ["sampler=weighted", f"sampler_options={{weights: {weights}}}"]
        samples = watch(words, output)
        kept = compare_frozen(model, output / "model", num_layers) if options.frozen_bits else ""
        read = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((output / "summary.json").read_text())
    steps = [row for row in read if "loss" in row]
    sets = [tuple(row["active_layers"]) for row in steps]
    table = tell(samples, steps, options.interval_steps)
    page = write_page("soak" + (f"-{options.frozen_bits}-bits" if options.frozen_bits else ""), table, __doc__)
    figure = page.with_suffix(".svg")
    draw(samples, steps, figure)
    held = [f"Held-out loss {summary['eval_loss_before']:.4f} before, {summary['eval_loss_after']:.4f} after. "]
    held += [
        f"{len(sets):,} steps, {len(sets) // options.interval_steps} draws of layers, a checkpoint every 100 steps "
    ]
    held += ["(its seconds are not in the time of a step). One process, "]
    held += [
        f"{os.environ.get('OMP_NUM_THREADS', 'all')} threads, on a machine that did other work.\n\n![soak]({figure.name})\n"
    ]
    page.write_text(page.read_text() + "\n" + "".join(held) + kept, encoding="utf-8")
    print(page.read_text())


def compare_frozen(before: Path, after: Path, num_layers: int) -> str:
    """Whether the layers that were never drawn, and those that were, have the bytes that they began with."""

    def digests(folder: Path) -> dict[str, str]:
        sums = {number: hashlib.sha256() for number in range(num_layers)}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in sorted(file.keys()):
                    if name.startswith("model.layers."):
                        sums[int(name.split(".")[2])].update(file.get_tensor(name).numpy().tobytes())
        return {str(number): digest.hexdigest() for number, digest in sums.items()}

    was, now = digests(before), digests(after)
    equal = [number for number in was if was[number] == now[number]]
    return f"\nLayers whose exact weights have the SHA-256 that they began with: {', '.join(equal)} (never drawn: {num_layers - 2}, {num_layers - 1}).\n"


def watch(words: list[str], output: Path) -> list[dict[str, float]]:
    """Run ``words``; a sample a second: the step, resident bytes, open files."""
    process = subprocess.Popen(words)
    proc, samples = Path(f"/proc/{process.pid}"), []
    while process.poll() is None:
        time.sleep(1)
        try:
            lines = (output / "metrics.jsonl").read_text().splitlines()
            step = json.loads(lines[-1])["step"]
            resident = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            files = len(list((proc / "fd").iterdir()))
            ticks = sum(map(int, (proc / "stat").read_text().rpartition(")")[2].split()[11:13]))
        except (OSError, ValueError, IndexError):
            continue
        if step and not (output / "model").exists():
            samples.append(
                {"step": step, "resident": resident, "files": files, "cpu": ticks / os.sysconf("SC_CLK_TCK")}
            )
    if process.returncode:
        sys.exit(process.returncode)
    return samples


def tell(samples: list[dict[str, float]], steps: list[dict], interval: int) -> str:
    """Medians of the first tenth (without its first interval), of the middle and of the last tenth."""
    last = steps[-1]["step"]
    spans = {
        "first tenth": (interval, last // 10),
        "middle tenth": (last * 45 // 100, last * 55 // 100),
        "last tenth": (last - last // 10, last),
    }

    def median(rows: list[dict], key: str, span: tuple[int, int]) -> float:
        return statistics.median(row[key] for row in rows if span[0] < row["step"] <= span[1])

    table: list[list[str]] = []
    for name, rows, key, unit, digits in [
        ("resident memory, GiB", samples, "resident", GIB, 3),
        ("optimizer state, bytes", steps, "state_bytes", 1, 0),
        ("open files", samples, "files", 1, 0),
        ("time of a step, ms", steps, "step_seconds", 1e-3, 1),
    ]:
        every = [row[key] / unit for row in rows if row["step"] > interval]
        cells = [f"{median(rows, key, span) / unit:,.{digits}f}" for span in spans.values()]
        table.append([name, *cells, f"{min(every):,.{digits}f} to {max(every):,.{digits}f}"])
    cells = []
    for low, high in spans.values():
        inside = [row for row in samples if low < row["step"] <= high]
        first, final = inside[0], inside[-1]
        cells.append(f"{1e3 * (final['cpu'] - first['cpu']) / (final['step'] - first['step']):,.1f}")
    table.append(["processor time of a step, checkpoints included, ms", *cells, ""])
    return markdown(["", *spans, "smallest to largest"], table)


def draw(samples: list[dict[str, float]], steps: list[dict], path: Path) -> None:
    """Four curves over the steps."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(4, 1, figsize=(8, 8), sharex=True, layout="constrained")
    thin = steps[:: max(1, len(steps) // 1000)]
    curves = [
        ("resident, GiB", samples, "resident", GIB), ("optimizer state, MiB", thin, "state_bytes", 2**20),
        ("open files", samples, "files", 1), ("step, ms", thin, "step_seconds", 1e-3),
    ]  # fmt: skip
    for axis, (name, rows, key, unit) in zip(axes, curves, strict=True):
        values = [row[key] / unit for row in rows]
        axis.plot([row["step"] for row in rows], values, linewidth=0.8)
        axis.set_ylim(0, 1.15 * sorted(values)[int(0.99 * (len(values) - 1))])
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("optimizer step")
    figure.savefig(path)


if __name__ == "__main__":
    main()
