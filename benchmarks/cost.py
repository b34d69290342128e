"""Time of an optimizer step: methods against full fine-tuning and levers against LISA, one process, steps by turns.

python benchmarks/cost.py [--shape smollm2-135m] [--rows 4] [--tokens 128] [--rounds 15] [--dtype float32]

Every row has its own copy of the model, random weights, and the same batch. Each round runs one step of each, so that a
machine whose speed drifts slows all of them; the ratio is taken round by round and its median quoted. The first two
rounds warm up. LISA switches layers in every step here, where the default is every 20: the engine's cost is an upper
bound. Matrix work is counted by PyTorch's FlopCounterMode in one more step. Peaks are forecasts.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import Any

import torch
from results import SHAPES, markdown, write_page
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from lisatune.assemble import make_learner
from lisatune.data.loader import Batch
from lisatune.memory.measure import state_bytes
from lisatune.models.load import pick_device
from lisatune.plan.forecast import model_config, plan_config, plan_run

FREE = {"max_grad_norm": 0}
SLICES = {"sampled_unit": "slices", "train_norms": True}  # one of 15, in each step
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "LoRA r16, all linear": {"method": "lora"},
    "LISA": {},
    "LISA, embedding and head frozen": {"train_embedding": False, "train_head": False},
    "LISA in slices, 1 of 15": SLICES,
    "the same, embedding and head whole": SLICES | {"train_embedding": True, "train_head": True},
    "LISA in slices of rows": SLICES | {"slices_of": "rows"},
    "LISA in slices, factored": SLICES | {"optim": "factored"},
    "LISA in slices, spectral": SLICES | {"optim": "spectral"},
    "full, sign of the gradient": {"method": "full", "optim": "sign"},
}
LEVERS: dict[str, dict[str, Any]] = {
    "LISA": {},
    "`vocabulary_blocks=true`": {"vocabulary_blocks": True},
    "`vocabulary_blocks=true max_grad_norm=0 optimizer_in_backward=true`": {"vocabulary_blocks": True, "optimizer_in_backward": True} | FREE,
    "`optimizer_in_backward=true max_grad_norm=0`": {"optimizer_in_backward": True} | FREE,
    "`optim=adamw_16bit`": {"optim": "adamw_16bit"},
    "`optim=adamw_8bit`": {"optim": "adamw_8bit"},
    "`gradient_checkpointing=15`": {"gradient_checkpointing": 15},
    "`gradient_checkpointing=true`": {"gradient_checkpointing": True},
    "`gradient_checkpointing=true`, embedding and head frozen": {"gradient_checkpointing": True, "train_embedding": False, "train_head": False},
}  # fmt: skip
MOVES = {
    "`offload_optimizer=true`": {"offload_optimizer": True},
    "`gradient_checkpointing=true activation_offloading=true`": {"gradient_checkpointing": True, "activation_offloading": True},
    "`gradient_checkpointing=true offload_frozen=true`": {"gradient_checkpointing": True, "offload_frozen": True},
}  # fmt: skip


class Contender:
    """One way to train with a model of its own."""

    def __init__(self, settings: dict[str, Any], options: argparse.Namespace, device: torch.device) -> None:
        shape = model_config(str(SHAPES / f"{options.shape}.json"))
        more = {"dtype": options.dtype, "interval_steps": 1} | settings
        more |= {"per_device_train_batch_size": options.rows, "max_length": options.tokens}
        if settings.get("method", "lisa") != "lisa":
            del more["interval_steps"]
        config = plan_config(more, device.type)
        torch.manual_seed(0)
        with device:
            model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, options.dtype))
        self.learner = make_learner(config, model, device)
        self.learner.model.train()
        self.peak = plan_run(config, shape, device.type).peak_bytes
        self.device = device
        self.engine_seconds: list[float] = []
        self.flops = 0
        if self.learner.engine:
            self._time_engine(self.learner.engine)

    def _time_engine(self, engine: Any) -> None:
        begin = engine.begin_step

        def timed(*args: Any) -> bool:
            start = time.perf_counter()
            switched: bool = begin(*args)
            self.engine_seconds.append(time.perf_counter() - start)
            return switched

        engine.begin_step = timed

    def step(self, number: int, batch: Batch) -> float:
        """Seconds of one whole step, synchronised."""
        _synchronise(self.device)
        start = time.perf_counter()
        self.learner.step(number, [batch], batch.num_labelled)
        _synchronise(self.device)
        return time.perf_counter() - start

    def count(self, number: int, batch: Batch) -> None:
        """Matrix work of one step."""
        with FlopCounterMode(display=False) as counter:
            self.learner.step(number, [batch], batch.num_labelled)
        self.flops = counter.get_total_flops()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_seconds(
    rows: dict[str, dict[str, Any]], options: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Contender], dict[str, list[float]]]:
    """Seconds of each step of each of ``rows``, which take turns."""
    contenders = {name: Contender(settings, options, device) for name, settings in rows.items()}
    ids = torch.randint(3, 1000, (options.rows, options.tokens), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(options.tokens).repeat(options.rows, 1)
    batch = Batch(ids, ids.roll(-1, 1), positions, torch.ones_like(ids, dtype=torch.bool)).to(device)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(options.rounds + 2):
        for name, contender in contenders.items():
            took = contender.step(number, batch)
            if number >= 2:
                seconds[name].append(took)
    for contender in contenders.values():
        contender.count(options.rounds + 2, batch)
    return contenders, seconds


def race(
    rows: dict[str, dict[str, Any]], against: str, options: argparse.Namespace, device: torch.device
) -> tuple[str, dict[str, Any]]:
    """A table of ``rows``, each timed against ``against``."""
    contenders, seconds = step_seconds(rows, options, device)
    head = ["", "s/step, median", f"against {against}, median (min to max)", f"matrix work against {against}",
            "peak MiB, forecast", "optimizer state MiB"]  # fmt: skip
    table = []
    for name, contender in contenders.items():
        ratios = [a / b for a, b in zip(seconds[name], seconds[against], strict=True)]
        table.append([
            name, f"{statistics.median(seconds[name]):.3f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            f"{contender.flops / contenders[against].flops:.2f}", f"{contender.peak / 2**20:.0f}",
            f"{state_bytes(contender.learner.optimizer) / 2**20:.0f}",
        ])  # fmt: skip
    lisa = contenders["LISA"]
    share = statistics.median(lisa.engine_seconds[2:]) / statistics.median(seconds["LISA"])
    return markdown(head, table), {"engine_share": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--methods-only", action="store_true", help="leave the levers out")
    options = parser.parse_args()
    device = pick_device("auto")
    methods, told = race(METHODS, "full", options, device)
    gc.collect()
    if options.methods_only:
        print(
            write_page(
                "cost-methods",
                f"Batch: {options.rows} x {options.tokens} tokens, all labelled, {options.dtype}, shape {options.shape}.\n\n{methods}",
                __doc__ or "",
            )
        )
        return
    levers, _ = race(LEVERS | (MOVES if device.type == "cuda" else {}), "LISA", options, device)
    text = (
        f"Batch: {options.rows} x {options.tokens} tokens, all labelled, {options.dtype}, shape {options.shape}.\n\n"
        f"## Methods\n{methods}\n\nThe engine with a switch in every step took {100 * told['engine_share']:.2f}% of LISA's step.\n\n"
        f"## Levers, each by itself, on LISA\n{levers}\n\n"
        + (
            ""
            if device.type == "cuda"
            else "Levers that move bytes to host memory have no effect on a CPU and were not timed.\n"
        )
    )
    print(write_page("cost", text, __doc__ or ""))


if __name__ == "__main__":
    main()
