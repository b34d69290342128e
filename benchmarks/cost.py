"""Time and memory of an optimizer step of LISA, LoRA r16 and full fine-tuning: one process, steps by turns.

python benchmarks/cost.py --model MODEL [--rows 4] [--tokens 128] [--rounds 15] [--dtype float32]

Every method has its own copy of the model and the same batch. Each round runs one step of each, so that a machine whose
speed drifts slows all of them; the ratio is taken round by round and its median quoted. The first two rounds warm up.
LISA switches layers in every step here, where the default is every 20: the engine's cost is an upper bound.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from results import write_page

from lisatune import LisaEngine, UniformSampler, find_layers
from lisatune.config import build_config
from lisatune.data.loader import Batch
from lisatune.evaluate import batch_loss
from lisatune.layers import Layers
from lisatune.memory.measure import state_bytes, tensor_bytes
from lisatune.models import load_model, pick_device
from lisatune.train import add_adapters, clip_gradients, make_optimizer

METHODS = ("lisa", "lisa, embedding and head frozen", "lora", "full")


class Contender:
    """One method with its model and optimizer."""

    def __init__(self, method: str, name: str, dtype: str, device: torch.device) -> None:
        method, _, frozen = method.partition(", ")
        config = build_config({"model": name, "data": "-", "output": "-", "method": method, "dtype": dtype})
        model, _ = load_model(name, getattr(torch, dtype))
        self.model: Any = model.to(device).train()
        self.layers: Layers = find_layers(model)
        if method == "lora":
            self.model = add_adapters(config, model)
        self.optimizer = make_optimizer(config, self.model)
        self.engine = None
        if method == "lisa":
            sampler = UniformSampler(len(self.layers.decoder), 2)
            self.engine = LisaEngine(self.layers, sampler, 1, train_embedding=not frozen, train_head=not frozen)
        self.engine_seconds: list[float] = []
        self.gradient_bytes = 0

    def step(self, number: int, batch: Batch, device: torch.device) -> float:
        """Seconds of one whole step, synchronised."""
        _synchronise(device)
        start = time.perf_counter()
        if self.engine:
            self.engine.begin_step(number, self.optimizer)
            self.engine_seconds.append(time.perf_counter() - start)
        batch_loss(self.layers, batch, batch.num_labelled, linear_head=True).backward()
        clip_gradients(self.model, 1.0)
        self.optimizer.step()
        self.gradient_bytes = tensor_bytes(p.grad for p in self.model.parameters() if p.grad is not None)
        self.optimizer.zero_grad()
        _synchronise(device)
        return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    device = pick_device("auto")
    contenders = {method: Contender(method, options.model, options.dtype, device) for method in METHODS}
    ids = torch.randint(3, 1000, (options.rows, options.tokens), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(options.tokens).repeat(options.rows, 1)
    batch = Batch(ids, ids.roll(-1, 1), positions, torch.ones_like(ids, dtype=torch.bool)).to(device)
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for number in range(options.rounds + 2):
        for method, contender in contenders.items():
            took = contender.step(number, batch, device)
            if number >= 2:
                seconds[method].append(took)
    lines = [
        "| method | s/step, median | against full, median (min to max) | gradients MiB | optimizer state MiB |",
        "| --- " * 5 + "|",
    ]
    for method, contender in contenders.items():
        ratios = [a / b for a, b in zip(seconds[method], seconds["full"], strict=True)]
        lines.append(
            f"| {method} | {statistics.median(seconds[method]):.3f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {contender.gradient_bytes / 2**20:.1f} "
            f"| {state_bytes(contender.optimizer) / 2**20:.1f} |"
        )
    lisa = contenders["lisa"]
    counts = lisa.layers.num_parameters()
    # matrix work only: the input embedding's gradient is no matrix product, the head's is
    trained = lisa.layers.num_trainable((0, 1)) / sum(counts.values())
    share = statistics.median(lisa.engine_seconds[2:]) / statistics.median(seconds["lisa"])
    lines += [
        "",
        f"Matrix work alone (forward, gradient of activations, gradient of weights for the {trained:.0%} trained) predicts "
        f"{(2 + trained) / 3:.2f} of a full step for LISA; the smaller update of the optimizer comes on top. The engine with "
        f"a switch in every step took {100 * share:.2f}% of LISA's step.",
        f"Batch: {options.rows} x {options.tokens} tokens, all labelled, {options.dtype}.",
    ]
    print(write_page("cost", "\n".join(lines), __doc__ or ""))


if __name__ == "__main__":
    main()
