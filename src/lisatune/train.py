"""A whole training run: every part built from a config, then the loop."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lisatune.amounts import gib
from lisatune.config import TrainConfig, build_config, write_config
from lisatune.data.formats import Example
from lisatune.data.loader import Batch, Loader
from lisatune.data.tokenize import Encoded, Encoder
from lisatune.engine import LisaEngine
from lisatune.errors import UserError
from lisatune.evaluate import held_out_loss
from lisatune.fit import climb, pulled
from lisatune.layers import Layers, find_layers
from lisatune.learner import Learner, make_learner
from lisatune.memory.measure import PeakMeter, state_bytes, tensor_bytes
from lisatune.models import load_model, pick_device, save_model
from lisatune.plan import Plan, plan_run
from lisatune.preflight import check_output, preflight
from lisatune.progress import training_progress
from lisatune.tracking import Metrics, check_tracker


@dataclass
class Run:
    """All the parts of a run, built and checked, before its first step."""

    config: TrainConfig
    tokenizer: Any
    learner: Learner
    loader: Loader
    held_out: list[Batch]
    num_steps: int
    plan: Plan
    meter: PeakMeter
    device: torch.device

    def held_out_loss(self) -> float | None:
        """Loss on the held-out rows, if there are any."""
        if not self.held_out:
            return None
        learner = self.learner
        return held_out_loss(learner.layers, self.held_out, linear_head=learner.linear_head, device=self.device)


def train(config: TrainConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Train as ``config`` says and leave the run's folder behind.

    Returns: The summary, also in ``summary.json``: losses before and after, seconds, tokens, peak and state bytes.
    Raises: UserError for whatever the user can mend; then nothing has been written.
    """
    console = console or Console(stderr=True)
    run = build(config, *preflight(config), console=console)
    return fit(run, console=console)


def build(
    config: TrainConfig,
    examples: Iterable[Example],
    held_out: list[Example],
    *,
    console: Console,
    loaded: tuple[Any, Any] | None = None,
    memory_bytes: int | None = None,
) -> Run:
    """Load the model (or take ``loaded``, a model and its tokenizer), encode the data, and set the method up.

    With ``memory_bytes``, levers are pulled until the run fits into a device of that size.
    """
    check_tracker(config)
    config, device = settle(config)
    model, tokenizer = loaded or load_model(
        config.model, getattr(torch, config.dtype), trust_remote_code=config.trust_remote_code
    )
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    layers = find_layers(model, config.decoder_name)
    console.print(layers.describe(), highlight=False)
    if tokenizer.chat_template is None:
        console.print("the tokenizer has no chat template: a plain one is used, and saved with the model")
    loader, batches, num_steps, longest = _prepare_data(config, tokenizer, examples, held_out, console)
    if memory_bytes is None:
        plan = plan_run(config, model.config, device.type, tokens=longest)
    else:
        with console.status("looking for what fits"):
            rungs = climb(config, model.config, memory_bytes, device.type, tokens=longest)
        config, plan = rungs[-1].config, rungs[-1].plan
        levers = pulled(rungs[0], rungs[-1]) or "no lever is needed"
        console.print(f"to fit into {gib(memory_bytes)}: {levers}", highlight=False)
    console.print(plan.describe(), highlight=False)
    meter = PeakMeter(device, own_bytes=tensor_bytes(model.parameters()))
    learner = make_learner(config, model, device)
    if config.packing:
        _check_packing(learner.layers, device)
    return Run(config, tokenizer, learner, loader, batches, num_steps, plan, meter, device)


def fit(run: Run, *, console: Console) -> dict[str, Any]:
    """The loop. One optimizer step: one draw at most, one divisor for all its micro-batches, one update."""
    config, learner = run.config, run.learner
    folder = Path(config.output)
    check_output(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(config, folder / "config.yaml")
    started, tokens = time.perf_counter(), 0
    with Metrics(config, folder) as metrics, training_progress(run.num_steps, console) as progress:
        before = run.held_out_loss()
        after = before
        metrics.write(step=0, eval_loss=before, layers=learner.layers.describe(), plan=run.plan.as_dict())
        learner.model.train()
        for step, batch in enumerate(islice(run.loader, run.num_steps)):
            tick = time.perf_counter()
            learning_rate = set_learning_rate(learner.optimizer, config, step, run.num_steps)
            micro_batches = (micro.to(run.device) for micro in batch.split(config.per_device_train_batch_size))
            loss, grad_norm = (x.item() for x in learner.step(step, micro_batches, batch.num_labelled))
            seconds = time.perf_counter() - tick
            tokens += batch.num_tokens
            active = learner.engine.active if learner.engine else None
            last = step + 1 == run.num_steps
            evaluated = last or bool(config.eval_steps and (step + 1) % config.eval_steps == 0)
            if evaluated:
                after = run.held_out_loss()
            if evaluated or (step + 1) % config.logging_steps == 0:
                metrics.write(
                    step=step + 1, loss=loss, eval_loss=after if evaluated else None, learning_rate=learning_rate,
                    grad_norm=grad_norm, active_layers=active, sampled_parts=_sampled_parts(learner.engine),
                    tokens=batch.num_tokens, labelled_tokens=batch.num_labelled, step_seconds=seconds,
                    peak_bytes=run.meter.bytes(), state_bytes=state_bytes(learner.optimizer),
                )  # fmt: skip
            progress(step + 1, loss, batch.num_tokens / seconds, active)
    summary = {
        "method": config.method, "steps": run.num_steps, "tokens": tokens,
        "eval_loss_before": before, "eval_loss_after": after, "train_seconds": time.perf_counter() - started,
        "planned_peak_bytes": run.plan.peak_bytes, "peak_bytes": run.meter.bytes(), "base_bytes": run.meter.base_bytes,
        "state_bytes": state_bytes(learner.optimizer),
    }  # fmt: skip
    _save(run, folder)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _report(folder, console)
    return summary


def settle(config: TrainConfig) -> tuple[TrainConfig, torch.device]:
    """``config`` with what ``auto`` stands for on this machine, and the device.

    Raises: UserError for a device that is not there, or a lever that has no effect on it.
    """
    device = pick_device(config.device)
    settings = config.model_dump(exclude_unset=True) | {"device": str(device)}
    if config.dtype == "auto":
        settings["dtype"] = "bfloat16" if device.type == "cuda" else "float32"
    return build_config(settings), device


def learning_rate_at(config: TrainConfig, step: int, num_steps: int) -> float:
    """The learning rate of optimizer step ``step`` (from 0): transformers' schedules, as a pure function.

    Example:
        >>> from lisatune.config import build_config
        >>> config = build_config({"model": "m", "data": "d", "output": "o", "learning_rate": 1.0, "warmup_steps": 2})
        >>> [learning_rate_at(config, step, num_steps=6) for step in range(6)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
    """
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.learning_rate * max(0.0, factor[config.lr_scheduler_type])


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, num_steps: int) -> float:
    """Set and return the learning rate of ``step``; a switch of layers does not touch it."""
    rate = learning_rate_at(config, step, num_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def _sampled_parts(engine: LisaEngine | None) -> list[str] | None:
    """Embedding and head, if they are drawn like layers and are in training now."""
    if engine is None or engine.drawn is None or len(engine.pool) == len(engine.layers.decoder):
        return None
    return [engine.pool[i] for i in engine.drawn if i >= len(engine.layers.decoder)]


class _EncodedStream:
    """Documents encoded anew from their examples each time they are iterated."""

    def __init__(self, encoder: Encoder, examples: Iterable[Example]) -> None:
        self.encoder = encoder
        self.examples = examples

    def __iter__(self) -> Iterator[Encoded]:
        return self.encoder(self.examples)


def _prepare_data(
    config: TrainConfig, tokenizer: Any, examples: Iterable[Example], held_out: list[Example], console: Console
) -> tuple[Loader, list[Batch], int, int]:
    def encode(some: Iterable[Example], name: str) -> list[Encoded]:
        encoder = Encoder(tokenizer, config.max_length, completion_only_loss=config.completion_only_loss)
        with console.status(f"tokenizing {name}"):
            documents = list(encoder(some))
        console.print(f"{name}: {encoder.counts.describe()}", highlight=False)
        if not documents:
            raise UserError(
                f"{config.data}: no row holds anything to learn within max_length={config.max_length}: raise it"
            )
        return documents

    def load(documents: Iterable[Encoded], rows_per_step: int, **options: Any) -> Loader:
        return Loader(
            documents, rows_per_step=rows_per_step, max_length=config.max_length, pad_id=tokenizer.pad_token_id or 0,
            packing=config.packing, seed=config.seed, **options,
        )  # fmt: skip

    documents: Iterable[Encoded]
    if config.streaming:
        encoder = Encoder(tokenizer, config.max_length, completion_only_loss=config.completion_only_loss)
        documents = _EncodedStream(encoder, examples)
        console.print(f"{config.data}: rows are read as they are needed")
    else:
        documents = encode(examples, "train")
    loader = load(documents, config.per_device_train_batch_size * config.gradient_accumulation_steps)
    num_steps = config.max_steps or max(1, math.ceil(config.num_train_epochs * loader.num_steps()))
    batches = []
    if held_out:
        batches = list(load(encode(held_out, "held out"), config.per_device_train_batch_size, shuffle=False).epoch(0))
    known = not config.streaming and not config.packing
    longest = max(len(document) for document in documents) if known else config.max_length
    return loader, batches, num_steps, longest


@torch.no_grad()
def _check_packing(layers: Layers, device: torch.device) -> None:
    """Refuse packing for a model in which a packed document would see the one before; found by trying it."""
    layers.model.eval()
    first, second = torch.tensor([[1, 2, 3, 4]], device=device), torch.tensor([[5, 6, 7]], device=device)
    packed = torch.cat([first, second], dim=1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]], device=device)
    together = layers.trunk(input_ids=packed, position_ids=positions)[:, 4:]
    alone = layers.trunk(input_ids=second, position_ids=positions[:, 4:])
    # rounding differs with the shapes; a leak changes the hidden states by a share of their size
    if (together - alone).abs().max() > 0.02 * alone.abs().max():
        raise UserError(
            f"packing=true: {type(layers.model).__name__} would mix packed documents with each other; leave packing out"
        )


def _save(run: Run, folder: Path) -> None:
    model = run.learner.model
    if run.config.method == "lora":
        model.save_pretrained(folder / "adapter")
        if run.learner.host_layers:
            model.to("cpu")  # adapters are merged where the weights are
            run.learner.host_layers.remove(torch.device("cpu"))
        model = model.merge_and_unload()
    model.requires_grad_(True)
    save_model(model, run.tokenizer, folder / "model")


def _report(folder: Path, console: Console) -> None:
    try:
        from lisatune.analysis.report import write_report
    except ImportError:
        console.print(
            "no report.html, which needs matplotlib: pip install 'lisatune[report]', then lisatune report RUN"
        )
        return
    write_report(folder)
