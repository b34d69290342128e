"""Host memory that is a process' own, and the time, until a run takes its first step; random weights.

python benchmarks/loading.py [--layers 4] [--threads 1]

Needs the tokenizer of stories15M in shared/ beside the checkout. A model with the widths of Llama-2-7B and few layers is written in bfloat16. Runs on one and two processes take one step
with it, in the type of its file and in float32, whole and in shards. A process' own memory (``RssAnon``) is read from
outside every 20 ms: pages of the file are not in it, which the processes of a host share and the system may drop.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from results import SHAPES, SHARED, markdown, write_page

GIB = 2**30
CASES = ((1, 1, "bfloat16"), (1, 1, "float32"), (2, 2, "bfloat16"), (2, 2, "float32"))


def write_model(folder: Path, shape: str, layers: int | None = None) -> int:
    """A random Llama in bfloat16 with the shape of that name, and as many layers; its number of parameters."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    config = AutoConfig.from_pretrained(SHAPES / f"{shape}.json")
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.normal_(p.data, std=0.02)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(SHARED / "models/stories15M/hf").save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def own_bytes(process: int) -> dict[int, int]:
    """Own memory of the Python processes that ``process`` has started, itself too, by their ids."""
    found, waiting = {}, [process]
    while waiting:
        number = waiting.pop()
        try:
            lines = Path(f"/proc/{number}/status").read_text().splitlines()
            found[number] = next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            waiting += map(int, Path(f"/proc/{number}/task/{number}/children").read_text().split())
        except (OSError, StopIteration):  # it has just ended
            continue
    return found


def measure(model: Path, data: Path, output: Path, case: tuple[int, int, str]) -> list[str]:
    """Peaks of a process until weights are in place, and until the first step is taken; seconds to both."""
    num_ranks, shard_size, dtype = case
    words = [
        sys.executable, "-m", "lisatune", "train", "--model", model, "--data", data, "--output", output, "recipe=paper",
        "num_active=1", "train_embedding=false", "train_head=false", "optim=adamw_16bit", f"dtype={dtype}", "device=cpu",
        "max_steps=1", "max_length=32", "per_device_train_batch_size=1", "gradient_checkpointing=true",
    ]  # fmt: skip
    words += ["--nproc", num_ranks, f"dp_shard_size={shard_size}"] if num_ranks > 1 else []
    begun, peaks, seconds = time.monotonic(), [0], list[float]()
    run = subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = output / "metrics.jsonl"
    while run.poll() is None and len(seconds) < 2:
        peaks[-1] = max(peaks[-1], *own_bytes(run.pid).values(), 0)
        lines = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        if lines > len(seconds):  # the line of step 0, then that of step 1
            seconds.append(time.monotonic() - begun)
            peaks.append(peaks[-1])
        time.sleep(0.02)
    if run.wait():
        sys.exit(f"{case} failed")
    cells = [f"{peak / GIB:.2f}" for peak in peaks[:2]] + [f"{second:.0f}" for second in seconds]
    return [num_ranks, shard_size, dtype, *cells]  # type: ignore[list-item]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        model, data = Path(folder) / "model", Path(folder) / "rows.jsonl"
        numel = write_model(model, "llama-2-7b", options.layers)
        data.write_text("".join(json.dumps({"text": "one two three " * 10}) + "\n" for _ in range(8)), encoding="utf-8")
        rows = []
        for number, case in enumerate(CASES):
            rows.append(measure(model, data, Path(folder) / f"run-{number}", case))
            print(*rows[-1], sep=" | ", flush=True)
    about = (
        f"{numel:,} parameters: {2 * numel / GIB:.2f} GiB in bfloat16, as the file has them, and {4 * numel / GIB:.2f} in float32. "
        "Own memory of the process that has most of it, Python and its libraries included (about 0.4 GiB). On a machine that did "
        "other work.\n\n"
    )
    head = ["processes", "`dp_shard_size`", "`dtype`", "GiB until weights are placed", "until the first step",
            "s until weights are placed", "until the first step"]  # fmt: skip
    print(write_page("loading", about + markdown(head, rows), __doc__ or "").read_text())


if __name__ == "__main__":
    main()
