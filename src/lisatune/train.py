"""A whole training run: every part built from a config, then the loop."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor

from lisatune.config import TrainConfig, write_config
from lisatune.data.formats import Example
from lisatune.data.loader import Batch, Loader
from lisatune.data.tokenize import Encoded, Encoder
from lisatune.engine import LisaEngine
from lisatune.errors import UserError, missing_package
from lisatune.evaluate import batch_loss, held_out_loss
from lisatune.layers import Layers, find_layers
from lisatune.memory.measure import peak_bytes, state_bytes
from lisatune.models import load_model, pick_device, save_model
from lisatune.optim.adamw import AdamW
from lisatune.plan import Plan, plan_static
from lisatune.preflight import check_output, preflight
from lisatune.progress import training_progress
from lisatune.sampling import UniformSampler
from lisatune.tracking import Metrics, check_tracker


@dataclass
class Run:
    """All the parts of a run, built and checked, before its first step."""

    config: TrainConfig
    model: Any
    tokenizer: Any
    layers: Layers
    linear_head: bool
    optimizer: torch.optim.Optimizer
    engine: LisaEngine | None
    loader: Loader
    held_out: list[Batch]
    num_steps: int
    plan: Plan
    device: torch.device

    def held_out_loss(self) -> float | None:
        """Loss on the held-out rows, if there are any."""
        if not self.held_out:
            return None
        return held_out_loss(self.layers, self.held_out, linear_head=self.linear_head, device=self.device)


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
) -> Run:
    """Load the model (or take ``loaded``, a model and its tokenizer), encode the data, and set the method up."""
    check_tracker(config)
    device = pick_device(config.device)
    dtype = getattr(torch, config.dtype)
    model, tokenizer = loaded or load_model(config.model, dtype, trust_remote_code=config.trust_remote_code)
    model.to(device)
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    layers = find_layers(model, config.decoder_name)
    console.print(layers.describe(), highlight=False)

    if tokenizer.chat_template is None:
        console.print("the tokenizer has no chat template: a plain one is used, and saved with the model")
    loader, batches, num_steps = _prepare_data(config, tokenizer, examples, held_out, console)
    if config.packing:
        _check_packing(layers, model, device)

    engine = None
    if config.method == "lora":
        model = add_adapters(config, model)
    if config.gradient_checkpointing:
        enable = cast(Any, model).gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.method == "lisa" and not config.train_embedding:
            cast(Any, model).disable_input_require_grads()  # else the backward pass would not end at the lowest layer
    optimizer = make_optimizer(config, model)
    if config.method == "lisa":
        sampler = UniformSampler(len(layers.decoder), config.num_active, config.seed)
        engine = LisaEngine(
            layers, sampler, config.interval_steps, config.state_policy,
            train_embedding=config.train_embedding, train_head=config.train_head,
        )  # fmt: skip
    plan = plan_static(model, engine)
    console.print(
        f"{config.method} on {device}, weights and gradients {config.dtype}, optimizer state float32:", highlight=False
    )
    console.print(plan.describe(), highlight=False)
    return Run(
        config,
        model,
        tokenizer,
        layers,
        layers.head_is_linear(),
        optimizer,
        engine,
        loader,
        batches,
        num_steps,
        plan,
        device,
    )


def fit(run: Run, *, console: Console) -> dict[str, Any]:
    """The loop. One optimizer step: one draw at most, one divisor for all its micro-batches, one update."""
    config, layers, optimizer = run.config, run.layers, run.optimizer
    folder = Path(config.output)
    check_output(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(config, folder / "config.yaml")
    started, tokens = time.perf_counter(), 0
    with Metrics(config, folder) as metrics, training_progress(run.num_steps, console) as progress:
        before = run.held_out_loss()
        after = before
        planned = {f"planned_{name}": value for name, value in asdict(run.plan).items()}
        metrics.write(step=0, eval_loss=before, layers=layers.describe(), **planned)
        run.model.train()
        for step, batch in enumerate(islice(run.loader, run.num_steps)):
            tick = time.perf_counter()
            learning_rate = set_learning_rate(optimizer, config, step, run.num_steps)
            if run.engine:
                run.engine.begin_step(step, optimizer)
            loss = 0.0
            for micro in batch.split(config.per_device_train_batch_size):
                part = batch_loss(layers, micro.to(run.device), batch.num_labelled, linear_head=run.linear_head)
                part.backward()  # type: ignore[no-untyped-call]
                loss += part.item()
            grad_norm = clip_gradients(run.model, config.max_grad_norm)
            _refuse_non_finite(step, loss, grad_norm, folder)
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - tick
            tokens += batch.num_tokens
            active = list(run.engine.active or ()) if run.engine else None
            last = step + 1 == run.num_steps
            evaluated = last or bool(config.eval_steps and (step + 1) % config.eval_steps == 0)
            if evaluated:
                after = run.held_out_loss()
            if evaluated or (step + 1) % config.logging_steps == 0:
                metrics.write(
                    step=step + 1, loss=loss, eval_loss=after if evaluated else None, learning_rate=learning_rate,
                    grad_norm=grad_norm, active_layers=active, tokens=batch.num_tokens, labelled_tokens=batch.num_labelled,
                    step_seconds=seconds, peak_bytes=peak_bytes(run.device), state_bytes=state_bytes(optimizer),
                )  # fmt: skip
            progress(step + 1, loss, batch.num_tokens / seconds, active)
    summary = {
        "method": config.method, "steps": run.num_steps, "tokens": tokens,
        "eval_loss_before": before, "eval_loss_after": after, "train_seconds": time.perf_counter() - started,
        "peak_bytes": peak_bytes(run.device), "state_bytes": state_bytes(optimizer),
    }  # fmt: skip
    _save(run, folder)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _report(folder, console)
    return summary


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


def make_optimizer(config: TrainConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW over all parameters that ask for a gradient now; weight decay on matrices alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if config.dtype == "bfloat16":
        return AdamW(groups, **options, seed=config.seed)
    return torch.optim.AdamW(groups, **options, fused=True)


def clip_gradients(model: torch.nn.Module, max_norm: float) -> float:
    """Scale the gradients down to the global norm ``max_norm`` (0: leave them); returns the norm before."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm: Tensor = torch.nn.utils.get_total_norm(gradients)
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_([p for p in model.parameters() if p.grad is not None], max_norm, norm)
    return norm.item()


def _refuse_non_finite(step: int, loss: float, grad_norm: float, folder: Path) -> None:
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise UserError(
            f"step {step + 1}: the loss is {loss} and the gradient norm {grad_norm}, so the run was stopped before the "
            f"update; try a lower learning_rate or warmup_steps (metrics so far are in {folder})"
        )


class _EncodedStream:
    """Documents encoded anew from their examples each time they are iterated."""

    def __init__(self, encoder: Encoder, examples: Iterable[Example]) -> None:
        self.encoder = encoder
        self.examples = examples

    def __iter__(self) -> Iterator[Encoded]:
        return self.encoder(self.examples)


def _prepare_data(
    config: TrainConfig, tokenizer: Any, examples: Iterable[Example], held_out: list[Example], console: Console
) -> tuple[Loader, list[Batch], int]:
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
    return loader, batches, num_steps


@torch.no_grad()
def _check_packing(layers: Layers, model: Any, device: torch.device) -> None:
    """Refuse packing for a model in which a packed document would see the one before; found by trying it."""
    model.eval()
    first, second = torch.tensor([[1, 2, 3, 4]], device=device), torch.tensor([[5, 6, 7]], device=device)
    packed = torch.cat([first, second], dim=1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]], device=device)
    together = layers.trunk(input_ids=packed, position_ids=positions)[:, 4:]
    alone = layers.trunk(input_ids=second, position_ids=positions[:, 4:])
    # rounding differs with the shapes; a leak changes the hidden states by a share of their size
    if (together - alone).abs().max() > 0.02 * alone.abs().max():
        raise UserError(
            f"packing=true: {type(model).__name__} would mix packed documents with each other; leave packing out"
        )


def add_adapters(config: TrainConfig, model: Any) -> Any:
    """``model`` with LoRA's adapters in the type of its weights, everything else frozen; needs peft."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise missing_package("peft", "method=lora", "lora") from error
    adapters = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
    )
    try:
        return get_peft_model(model, adapters, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(f"lora_target_modules={config.lora_target_modules}: {error}") from error


def _save(run: Run, folder: Path) -> None:
    model = run.model
    if run.config.method == "lora":
        model.save_pretrained(folder / "adapter")
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
