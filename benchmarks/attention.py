"""Packed rows: attention a document at a time, as `auto` computes it, against one with a mask of all pairs of tokens (`sdpa`).

python benchmarks/attention.py [--steps 3]

LISA with layers and two active ones, which switch at every other step, on packed rows of Dolly. Both ways begin with equal
weights, and take their steps by turns. Seconds are the process's own, on one core. Ratios leave out the first step.
The peak is what PyTorch's allocator gave out in a step, with weights and state.

Needs shared/models/stories15M and shared/data/dolly. The other model has random weights: 4 layers, width 512, and stories15M's
vocabulary of 32,000. Rows longer than stories15M's context are computed all the same: its positions are computed too.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import itertools
import json
import statistics
import time
from array import array
from typing import Any

import torch
from results import SHARED, markdown, write_page
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from lisatune.assemble import make_learner
from lisatune.data.loader import Batch, Loader
from lisatune.data.tokenize import Encoded
from lisatune.learner import Learner
from lisatune.memory.measure import allocated_peak, state_bytes, tensor_bytes
from lisatune.models.attention import set_attention
from lisatune.plan.forecast import plan_config, plan_run
from lisatune.settings import TrainConfig

STORIES = SHARED / "models/stories15M/hf"
WIDE = LlamaConfig(
    hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
    vocab_size=32000,
)  # fmt: skip
CASES = [("stories15M", 4, 1024), ("stories15M", 1, 4096), ("4 x 512", 4, 1024), ("4 x 512", 1, 4096)]  # fmt: skip
WAYS = ("sdpa", "auto")


def dolly() -> list[Encoded]:
    """Each row of Dolly as one document, all of it learned."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    with gzip.open(SHARED / "data/dolly/dolly_3k.json.gz", "rt", encoding="utf-8") as file:
        text = file.read()
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    texts = [f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in rows]
    return [Encoded(array("i", ids), array("i", ids)) for ids in tokenizer(texts)["input_ids"]]


def made(name: str, way: str, config: TrainConfig) -> Learner:
    torch.manual_seed(0)
    if name == "stories15M":
        model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(copy.deepcopy(WIDE), dtype=torch.float32)
    set_attention(model, way, packing=True)
    learner = make_learner(config, model, torch.device("cpu"))
    learner.model.train()
    return learner


def peak(learner: Learner, step: int, batch: Batch) -> int:
    """Bytes that lie there before a step, and the most that is given out in it."""
    weights = [*learner.model.parameters(), *learner.model.buffers(), *learner.placement.copies()]
    held = tensor_bytes(weights) + state_bytes(learner.optimizer)
    return held + allocated_peak(lambda: learner.step(step, [batch], batch.num_labelled))


def case(name: str, rows: int, tokens: int, documents: list[Encoded], steps: int) -> list[object]:
    """A row of the table."""
    settings: dict[str, Any] = {
        "recipe": "paper",
        "dtype": "float32",
        "interval_steps": 2,
        "num_active": 2,
        "max_length": tokens,
    }
    settings |= {"packing": True, "per_device_train_batch_size": rows}
    fitting = [document for document in documents if len(document) <= tokens]
    loader = Loader(fitting, rows_per_step=rows, max_length=tokens, pad_id=0, packing=True)
    batches = list(itertools.islice(loader.epoch(0), steps + 1))
    config = plan_config(settings, "cpu")
    learners = [made(name, way, config) for way in WAYS]
    seconds: tuple[list[float], list[float]] = ([], [])
    apart = 0.0
    for step, batch in enumerate(batches[:-1]):
        losses = []
        for learner, took in zip(learners, seconds, strict=True):
            clock = time.process_time()
            losses.append(float(learner.step(step, [batch], batch.num_labelled).loss))
            took.append(time.process_time() - clock)
        apart = max(apart, abs(losses[1] - losses[0]) / abs(losses[0]))
    ratios = [b / a for a, b in zip(*(took[1:] for took in seconds), strict=True)]
    peaks = [peak(learner, steps, batches[-1]) for learner in learners]
    plan = plan_run(config, learners[1].model.config, "cpu", rows=rows, tokens=tokens)
    per_row = sum(len(batch.places) for batch in batches) / (len(batches) * rows)
    return [
        name, f"{rows} x {tokens:,}", f"{per_row:.0f}", *(f"{statistics.median(took[1:]):.2f}" for took in seconds),
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", *(f"{p / 2**20:.0f}" for p in peaks),
        f"{plan.peak_bytes / 2**20:.0f}", f"{apart:.0e}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    documents, rows = dolly(), []
    for name, number, tokens in CASES:
        rows.append(case(name, number, tokens, documents, options.steps))
        print(*rows[-1], sep=" | ", flush=True)
    head = ["model", "rows x tokens", "documents a row", "s/step, mask", "by documents", "ratio, median (least to most)",
            "MiB, mask", "by documents", "forecast", "loss apart, at most"]  # fmt: skip
    print(write_page("attention", markdown(head, rows), __doc__ or ""))


if __name__ == "__main__":
    main()
