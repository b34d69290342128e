"""Decoder layers compiled (`torch_compile=true`) against plain ones: a step's time, kernels, and how far the loss is apart.

python benchmarks/compile.py [--steps 14] [--rows 4] [--tokens 128]

LISA with layers and two active ones, which switch at every other step; rows have two lengths. Both ways have a model of their
own, begin with equal weights, and take their steps by turns. Seconds are the process's own, on one core. Ratios leave out
the first four steps. Each kernel is compiled as in a first run, without a cache; the first step's seconds are the compiler's too.

Needs shared/models/stories15M; the other model has random weights: 4 layers, width 512, vocabulary 4,096.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import torch._inductor.config
from results import SHARED, markdown, processor_seconds, write_page
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaConfig

from lisatune.assemble import make_learner
from lisatune.data.loader import Batch
from lisatune.plan.forecast import plan_config

STORIES = SHARED / "models/stories15M/hf"
WIDE = LlamaConfig(
    hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8,
    vocab_size=4096,
)  # fmt: skip
WARM_UP = 4
CASES: list[tuple[str, dict[str, Any]]] = [
    ("stories15M", {}), ("stories15M", {"dtype": "bfloat16"}), ("4 x 512", {}), ("4 x 512", {"dtype": "bfloat16"}),
]  # fmt: skip


def make_model(name: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    if name == "stories15M":
        return AutoModelForCausalLM.from_pretrained(STORIES, dtype=dtype)
    return AutoModelForCausalLM.from_config(WIDE, dtype=dtype)


def batch(step: int, options: argparse.Namespace) -> Batch:
    tokens = options.tokens if step % 3 else 3 * options.tokens // 4
    ids = torch.randint(3, 4000, (options.rows, tokens), generator=torch.Generator().manual_seed(step))
    positions = torch.arange(tokens).repeat(options.rows, 1)
    return Batch(ids, ids.roll(-1, 1), positions, torch.ones_like(ids, dtype=torch.bool))


def case(name: str, settings: dict[str, Any], options: argparse.Namespace) -> list[object]:
    """A row of the table."""
    given = {"recipe": "paper", "dtype": "float32", "interval_steps": 2, "num_active": 2, "max_length": options.tokens}
    given |= {"per_device_train_batch_size": options.rows} | settings
    learners, dtype = [], getattr(torch, str(given["dtype"]))
    for compiled in (False, True):
        config = plan_config(given | {"torch_compile": compiled}, "cpu")
        learners.append(make_learner(config, make_model(name, dtype), torch.device("cpu")))
        learners[-1].model.train()
    seconds: tuple[list[float], list[float]] = ([], [])
    apart, made, first = 0.0, [counters["stats"]["unique_graphs"]], 0.0
    for step in range(options.steps):
        whole, losses = batch(step, options), []
        for learner, took in zip(learners, seconds, strict=True):
            begun, clock = processor_seconds(), time.process_time()
            losses.append(learner.step(step, [whole], whole.num_labelled).loss)
            took.append(time.process_time() - clock)
            first = first or (processor_seconds() - begun if learner is learners[1] else 0.0)
        apart = max(apart, abs(float(losses[1]) - float(losses[0])) / abs(float(losses[0])))
        made.append(counters["stats"]["unique_graphs"])
    ratios = [b / a for a, b in zip(*(took[WARM_UP:] for took in seconds), strict=True)]
    more = " ".join(f"`{key}={str(value).lower()}`" for key, value in settings.items())
    return [
        f"{name} {more}", *(f"{statistics.median(took[WARM_UP:]):.3f}" for took in seconds),
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", made[1] - made[0], made[-1] - made[1],
        f"{first:.0f}", f"{apart:.0e}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with torch._inductor.config.patch(force_disable_caches=True, compile_threads=1):
        for name, settings in CASES:
            torch._dynamo.reset()
            rows.append(case(name, settings, options))
            print(*rows[-1], sep=" | ", flush=True)
    head = ["model", "s/step, plain", "compiled", "ratio, median (least to most)", "kernels, first step", "later",
            "s of the first step", "loss apart, at most"]  # fmt: skip
    text = (
        f"{options.rows} rows of {options.tokens} tokens.\n\n{markdown(head, rows)}\n\nCompiling does not pay on a CPU in a run of "
        "minutes: the time of a step goes into products of matrices, which no compiler changes. It is off by default."
    )
    print(write_page("compile", text, __doc__ or ""))


if __name__ == "__main__":
    main()
