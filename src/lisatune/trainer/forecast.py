"""The peak of a training in the Trainer, predicted: its step, run on the meta device, as ``lisatune plan`` does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import fields
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lisatune.common.amounts import gib
from lisatune.memory.ledger import CUDA_GRANULARITY, Ledger
from lisatune.methods.lisa import OneDraw
from lisatune.optim.build import MetaAdamW
from lisatune.optim.suited import each_of
from lisatune.plan.meta_kernels import ATTENTION, experts_on_meta, mixed_on_meta, register_attention
from lisatune.processes.collectives import num_ranks
from lisatune.slices.engine import SliceEngine
from lisatune.slices.modules import ReadWhole
from lisatune.tasks import task_of
from lisatune.tasks.base import Task, kernels_on_meta, log_probs, meta_ids
from lisatune.trainer.settings import LisaSettings

MOST_ROWS = 10_000  # that are looked at for the longest
TASKS_OF = {"DPOConfig": "dpo", "KTOConfig": "kto", "ORPOConfig": "orpo", "RewardConfig": "reward"}


class Unpredicted(Exception):
    """Why a step cannot be predicted."""


def predicted(model: Any, settings: LisaSettings, arguments: Any, optimizer: Any, rows: Any) -> tuple[str, int]:
    """What is in the predicted peak beside weights, gradients and state, and its bytes; or why there is none, and 0.

    Args:
        model: The model that will train.
        settings: Of the callback.
        arguments: The Trainer's.
        optimizer: The Trainer's.
        rows: The Trainer's data set, whose rows are tokens.
    Cost: 1 to 7 seconds, whatever the size of the model.
    """
    try:
        check_predictable(arguments, optimizer, sliced=settings.sampled_unit == "slices")
        tokens = longest_row(rows, getattr(arguments, "max_length", None))
        with torch.random.fork_rng(devices=[]):  # a model is made here, which may draw
            ledger = run_on_meta(model, settings, arguments, tokens)
    except Unpredicted as reason:
        return f"activations and the loss come on top, not predicted: {reason}", 0
    except Exception as error:  # whatever a model's own code does that needs data
        return f"activations and the loss come on top, not predicted: {' '.join(str(error).split())[:120]}", 0
    peak = ledger.peak
    work = sum(peak.get(name, 0) for name in ("loss", "backward", "step", "other"))
    reference = f", reference model {gib(peak['reference'])}" if peak.get("reference") else ""
    text = (
        f"predicted peak {gib(ledger.peak_bytes)} with {arguments.per_device_train_batch_size} x {tokens} tokens: activations "
        f"{gib(peak.get('activations', 0))}, loss and other temporaries {gib(work)}{reference} on top"
    )
    return text, ledger.peak_bytes


def check_predictable(arguments: Any, optimizer: Any, *, sliced: bool) -> None:
    """Raise Unpredicted for what is not known on the meta device."""
    if num_ranks() > 1:
        raise Unpredicted("several processes")
    if arguments.fp16 or (arguments.bf16 and sliced):
        raise Unpredicted("of mixed precision only bf16 with layers is known")
    inner = getattr(each_of(optimizer)[0], "optimizer", each_of(optimizer)[0])
    if not isinstance(inner, torch.optim.AdamW) or getattr(arguments, "torch_compile", False):
        raise Unpredicted(f"only steps of AdamW are known, without compiling (here {type(inner).__name__})")
    loss_of(arguments)


def longest_row(rows: Any, max_length: int | None) -> int:
    """Tokens of the longest row, by the names of its columns.

    Raises: Unpredicted if the rows are no tokens yet.
    Example:
        >>> longest_row([{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}], None)
        4
    """
    first = rows[0] if hasattr(rows, "__getitem__") and len(rows) else {}
    names = [name for name in first if name.endswith("_ids")] if isinstance(first, Mapping) else []
    whole = [name for name in names if name.endswith("input_ids") and not name.startswith("prompt")]
    own = whole or [name for name in names if name != "prompt_ids"]
    if not own:
        raise Unpredicted("the rows are no tokens yet")
    before = "prompt_ids" if "prompt_ids" in names and not whole else None
    columns = rows.select_columns([*own, *([before] if before else [])]) if hasattr(rows, "select_columns") else rows
    lengths = (
        max(len(row[name]) for name in own) + (len(row[before]) if before else 0) for row in islice(columns, MOST_ROWS)
    )
    return min(max(lengths), max_length or 2**31)


Loss = Callable[[Any, Any, int, int], Tensor]


def loss_of(arguments: Any) -> tuple[Loss, Task | None]:
    """What the Trainer with these arguments computes of a micro-batch, and TRL's task if it is one.

    Raises: Unpredicted for a trainer that is not known.
    """
    kind = type(arguments).__name__
    if kind in TASKS_OF:
        found = task_of(TASKS_OF[kind])
        task = found(**{field.name: getattr(arguments, field.name) for field in fields(found)})
        return task.step_loss, task
    if kind == "SFTConfig":
        return lambda model, _reference, rows, tokens: -log_probs(model, rows, tokens).mean(), None
    if kind == "TrainingArguments":
        return own_loss, None
    raise Unpredicted(f"the steps of {kind.removesuffix('Config')} are not known")


def own_loss(model: Any, _reference: Any, rows: int, tokens: int) -> Tensor:
    """The model's own loss, which makes the logits of all tokens."""
    ids = meta_ids(rows, tokens)
    from accelerate.utils.operations import convert_to_fp32  # an extra, but the Trainer has it

    outputs = model(input_ids=ids, labels=ids, use_cache=False)
    loss: Tensor = convert_to_fp32(outputs)["loss"]  # as accelerate does with what a model gives
    return loss


def meta_copy(model: Any, arguments: Any) -> Any:
    """A model as ``model`` without weights, checkpointed as the Trainer will do."""
    device = next(model.parameters()).device.type
    register_attention("cpu" if device == "cpu" else "cuda")
    with torch.device("meta"):
        found = type(model)._from_config(copy.deepcopy(model.config), attn_implementation=ATTENTION, dtype=model.dtype)
    if arguments.gradient_checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it is about to be renamed
            found.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
    for module in model.modules():
        if isinstance(module, nn.Dropout) and not module.p:
            for own in found.modules():
                if isinstance(own, nn.Dropout):
                    own.p = 0.0  # TRL takes it out
            break
    return found.train()


def run_on_meta(model: Any, settings: LisaSettings, arguments: Any, tokens: int) -> Ledger:
    """Two optimizer steps, of which the ledger books every tensor; the second counts."""
    device = next(model.parameters()).device.type
    ledger = Ledger(1 if device == "cpu" else CUDA_GRANULARITY)
    loss, task = loss_of(arguments)
    rows, num_micro = arguments.per_device_train_batch_size, min(2, arguments.gradient_accumulation_steps)
    trl = kernels_on_meta(device, arguments.bf16) if task or loss is not own_loss else nullcontext()
    with ledger, experts_on_meta(), trl:
        copied, reference = meta_copy(model, arguments), None
        book(ledger, copied, "weights")
        if task and task.needs_reference:
            reference = meta_copy(model, arguments).requires_grad_(False).eval()
            book(ledger, reference, "reference")
        engine = settings.engine(copied)
        if isinstance(engine, SliceEngine):
            engine.draw_most()
            if engine.layers.head is not None:
                ReadWhole(engine.layers.head)
        else:
            sizes = [engine.layers.num_parameters()[part] for part in engine.pool]
            draws = engine.sampler.largest_draws(sizes, None)
            engine.sampler = OneDraw(len(engine.pool), draws[-1])
        optimizer = MetaAdamW(copied.parameters())
        watch(ledger, engine.layers.trunk_module, copied, optimizer)
        for step in range(2):
            ledger.reset_peak()
            engine.begin_step(step, optimizer)
            for _ in range(num_micro if step else 1):
                with mixed_on_meta() if arguments.bf16 else nullcontext():
                    made = loss(copied, reference, rows, tokens) / num_micro
                with mixed_on_meta(again=True) if arguments.bf16 else nullcontext():
                    made.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            book_state(ledger, optimizer)
    return ledger


def book_state(ledger: Ledger, optimizer: torch.optim.Optimizer) -> None:
    """Book what an optimizer holds. A function of its own, whose names hold nothing when the next step drops it."""
    for state in optimizer.state.values():
        for value in state.values():
            ledger.book(value, "state")


def book(ledger: Ledger, model: nn.Module, label: str) -> None:
    """Book what a model holds."""
    tensors: Iterable[Tensor] = (*model.parameters(), *(b for b in model.buffers() if b.is_meta))
    for tensor in tensors:
        ledger.book(tensor, label)


def watch(ledger: Ledger, trunk: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Tell the ledger what is being done, and which tensors are gradients."""

    def doing(label: str) -> Any:
        def hook(*_: Any) -> None:
            ledger.label = label

        return hook

    def gradient(p: Tensor) -> None:
        if p.grad is not None:
            ledger.book(p.grad, "gradients")

    trunk.register_forward_pre_hook(doing("activations"))
    trunk.register_forward_hook(doing("loss"))
    optimizer.register_step_pre_hook(doing("step"))
    optimizer.register_step_post_hook(doing("other"))
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(gradient)  # type: ignore[no-untyped-call]
