"""Gradients that processes sum in bfloat16 instead of float32: the error of a sum, and the held-out loss of a run.

python benchmarks/sums.py [--steps 40]

Needs stories15M and TinyStories in shared/ beside the checkout. Each of 2, 4 and 8 processes makes the bfloat16 gradients
of rows of its own. Gloo sums them both ways, and the errors are those beside a sum in float64. Then runs on 4 processes
train with both settings of ``reduce_dtype``, for two seeds.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from results import SHARED, lisatune, markdown, write_page

MODEL, STORIES = SHARED / "models/stories15M/hf", SHARED / "data/tinystories/tinystories_10k.txt.gz"
ROWS, TOKENS = 4, 128


def stories() -> list[str]:
    """The texts."""
    text = gzip.decompress(STORIES.read_bytes()).decode("utf-8")
    return [story.strip() for story in text.split("<|endoftext|>") if len(story) > 1000]


def errors(number: int, num_ranks: int, store: str, results: str) -> None:
    """In one of several processes: norm of the error of each sum of all gradients, as a share of the sum's norm."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lisatune.placement.copies import Copies

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=num_ranks)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = stories()[number * ROWS : (number + 1) * ROWS]
    ids = torch.tensor([tokenizer(text)["input_ids"][:TOKENS] for text in texts])
    (model(input_ids=ids, labels=ids).loss / num_ranks).backward()
    own = [p.grad.clone() for p in model.parameters()]
    exact = torch.cat([grad.double().flatten() for grad in own])
    dist.all_reduce(exact)
    found = []
    for in_float32 in (True, False):
        placement = Copies()
        placement.sums_in_float32 = in_float32
        for p, grad in zip(model.parameters(), own, strict=True):
            p.grad = grad.clone()
        placement.sum_gradients(model.parameters())
        summed = torch.cat([p.grad.double().flatten() for p in model.parameters()])
        found.append(((summed - exact).norm() / exact.norm()).item())
    if number == 0:
        Path(results).write_text(json.dumps(found))
    dist.destroy_process_group()


def sums() -> str:
    """Both errors for several numbers of processes."""
    rows = []
    for num_ranks in (2, 4, 8):
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "errors.json"
            torch.multiprocessing.spawn(errors, (num_ranks, f"{folder}/store", str(results)), nprocs=num_ranks)
            in_float32, in_bfloat16 = json.loads(results.read_text())
        rows.append([num_ranks, f"{100 * in_float32:.2f}%", f"{100 * in_bfloat16:.2f}%"])
        print(*rows[-1], sep=" | ", flush=True)
    return markdown(["processes", "summed in float32, then bfloat16", "summed in bfloat16"], rows)


def runs(steps: int) -> str:
    """Held-out losses of runs that differ in ``reduce_dtype`` alone."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in stories()[:2000]), encoding="utf-8")
        for seed in (0, 1):
            losses = []
            for reduce_dtype in ("float32", "auto"):
                output = Path(folder) / f"{reduce_dtype} {seed}"
                lisatune(
                    "train", "--nproc", 4, "--model", MODEL, "--data", data, "--output", output, "recipe=paper",
                    "dtype=bfloat16", f"reduce_dtype={reduce_dtype}", f"max_steps={steps}", f"seed={seed}",
                    f"max_length={TOKENS}", "per_device_train_batch_size=2", "learning_rate=2e-5", "eval_rows=50",
                )  # fmt: skip
                summary = json.loads((output / "summary.json").read_text())
                losses.append(summary["eval_loss_after"])
            rows.append([seed, f"{summary['eval_loss_before']:.4f}", *(f"{loss:.4f}" for loss in losses)])
            print(*rows[-1], sep=" | ", flush=True)
    return markdown(["seed", "before", "`reduce_dtype=float32`", "`reduce_dtype=auto`"], rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    text = [
        f"## The error of one sum\nstories15M in bfloat16, {ROWS} rows of {TOKENS} tokens a process. Norm of the error of all "
        "gradients, as a share of their norm.\n",
        sums(),
        f"\n## Held-out loss\nLISA by layers, {options.steps} steps on 4 processes, 8 rows a step.\n",
        runs(options.steps),
    ]
    print(write_page("sums", "\n".join(text), __doc__ or "").read_text())


if __name__ == "__main__":
    main()
