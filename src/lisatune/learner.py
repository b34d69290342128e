"""A model together with all that changes it: what one optimizer step is.

Training and the memory forecast both run this file, so the forecast forecasts what is run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lisatune.adapters import add_adapters
from lisatune.config import TrainConfig
from lisatune.data.loader import Batch
from lisatune.engine import LisaEngine
from lisatune.errors import UserError
from lisatune.evaluate import batch_loss
from lisatune.layers import Layers, find_layers
from lisatune.memory.backward_step import StepInBackward
from lisatune.memory.checkpointing import checkpoint_layers
from lisatune.memory.row_gradient import RowGradients, watch_embedding
from lisatune.memory.streaming import HostLayers, rest_to_device
from lisatune.optim.adamw import AdamW
from lisatune.optim.moments import StateBits
from lisatune.sampling import UniformSampler

STATE_BITS: dict[str, StateBits] = {"adamw": 32, "adamw_16bit": 16, "adamw_8bit": 8}


@dataclass
class Learner:
    """Takes optimizer steps.

    Args:
        model: The whole model, adapters included.
        layers: Its parts.
        linear_head: ``layers.head_is_linear()``.
        optimizer: Over all parameters that ever train.
        engine: Of LISA; None if the same parameters train in every step.
        max_grad_norm: Global norm that gradients are clipped to; 0 does not clip.
        row_gradients: Where gradients of embedding and head lie, if they are made a block at a time.
        in_backward: If the optimizer steps inside the backward pass.
        host_layers: If frozen layers are kept in host memory.
    """

    model: Any
    layers: Layers
    linear_head: bool
    optimizer: torch.optim.Optimizer
    engine: LisaEngine | None
    max_grad_norm: float
    row_gradients: RowGradients | None
    in_backward: StepInBackward | None
    host_layers: HostLayers | None

    def step(self, number: int, micro_batches: Iterable[Batch], num_labelled: int) -> tuple[Tensor, Tensor]:
        """Optimizer step ``number`` (from 0), at the learning rate that is set: one divisor for all its micro-batches.

        Returns: Loss and global gradient norm before clipping; scalars, float32.
        Raises: UserError if one of them is not finite; nothing has been updated then, unless in the backward pass.
        """
        if self.engine and self.engine.begin_step(number, self.optimizer) and self.host_layers:
            self.host_layers.place()
        losses = []
        for micro in micro_batches:
            loss = batch_loss(
                self.layers, micro, num_labelled, linear_head=self.linear_head, row_gradients=self.row_gradients
            )
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        total = torch.stack(losses).sum()
        if self.in_backward:
            self.optimizer.step()
            norm = self.in_backward.grad_norm()
            _refuse_non_finite(number, total, norm)
        else:
            norm = clip_gradients(self.optimizer, self.max_grad_norm, self.row_gradients)
            _refuse_non_finite(number, total, norm)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return total, norm


def make_learner(config: TrainConfig, model: Any, device: torch.device) -> Learner:
    """Set ``model`` up for the method and the levers of ``config``, in the one order that works, and move it to ``device``.

    Adapters first, since they add parameters; the optimizer before anything is frozen, since it has to hold every
    parameter that will ever train; checkpoints before streaming, which goes inside of them.
    """
    layers = find_layers(model, config.decoder_name)
    if config.method == "lora":
        model = add_adapters(
            model, rank=config.lora_r, alpha=config.lora_alpha, dropout=config.lora_dropout,
            targets=config.lora_target_modules,
        )  # fmt: skip
        layers = find_layers(layers.model, config.decoder_name)  # a head that got an adapter is another module now
    if config.gradient_checkpointing:
        count = None if config.gradient_checkpointing is True else config.gradient_checkpointing
        checkpoint_layers(layers.decoder, count, offload=config.activation_offloading)
    host_layers = None
    if config.offload_frozen:
        rest_to_device(model, layers.decoder, device)
        host_layers = HostLayers(layers.decoder, device)
    else:
        model.to(device)
    linear_head = layers.head_is_linear()
    rows = _row_gradients(config, layers, linear_head=linear_head)
    optimizer = make_optimizer(config, model, rows)
    in_backward = None
    if config.optimizer_in_backward:
        assert isinstance(optimizer, AdamW)
        in_backward = StepInBackward(optimizer)
    engine = None
    if config.method == "lisa":
        engine = make_engine(config, layers)
    elif host_layers:
        host_layers.place()  # LISA does so at its first step, when most layers are frozen
    return Learner(
        model, layers, linear_head, optimizer, engine, config.max_grad_norm, rows, in_backward, host_layers
    )  # fmt: skip


def make_engine(config: TrainConfig, layers: Layers) -> LisaEngine:
    """LISA as ``config`` says."""
    pool = layers.pool(train_embedding=config.train_embedding, train_head=config.train_head)
    return LisaEngine(
        layers, UniformSampler(len(pool), config.num_active, config.seed), config.interval_steps, config.state_policy,
        train_embedding=config.train_embedding, train_head=config.train_head,
    )  # fmt: skip


def make_optimizer(
    config: TrainConfig, model: torch.nn.Module, row_gradients: RowGradients | None = None
) -> torch.optim.Optimizer:
    """AdamW over all parameters that ask for a gradient now; weight decay on matrices alone.

    PyTorch's own where float32 and no lever is asked for, ours for the rest.
    """
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
    levers = config.offload_optimizer or config.optimizer_in_backward or config.vocabulary_blocks
    if config.optim == "adamw" and not levers and trained[0].dtype == torch.float32:
        return MetaAdamW(groups, **options) if trained[0].is_meta else torch.optim.AdamW(groups, **options, fused=True)
    return AdamW(
        groups, **options, seed=config.seed, state_bits=STATE_BITS[config.optim], offload_state=config.offload_optimizer,
        row_gradients=row_gradients,
    )  # fmt: skip


class MetaAdamW(torch.optim.AdamW):
    """What PyTorch's fused AdamW holds, for a forecast: two moments and no temporaries; it does not run on meta."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the moments of whatever has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def _row_gradients(config: TrainConfig, layers: Layers, *, linear_head: bool) -> RowGradients | None:
    if not config.vocabulary_blocks:
        return None
    if not linear_head:
        raise UserError(
            f"vocabulary_blocks: the logits of {type(layers.model).__name__} are more than a product with its head, so "
            "the head's gradient cannot be made in blocks: leave vocabulary_blocks out"
        )
    rows = RowGradients()
    watch_embedding(layers.embedding, rows)
    return rows


def clip_gradients(
    optimizer: torch.optim.Optimizer, max_norm: float, row_gradients: RowGradients | None = None
) -> Tensor:
    """Scale all gradients down to the global norm ``max_norm`` (0: leave them); returns the norm before, a scalar."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # in float32, whatever the gradients are: torch's get_total_norm would round the norm to bfloat16
    norms: list[Tensor] = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in parameters]
    if row_gradients is not None:
        norms += [row_gradients.sq_norm(p).sqrt() for p in row_gradients.parameters()]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        if row_gradients is not None:
            row_gradients.scale((max_norm / (norm + 1e-6)).clamp(max=1.0))  # as torch does
    return norm


def _refuse_non_finite(number: int, loss: Tensor, norm: Tensor) -> None:
    if loss.is_meta:
        return  # there are no values
    if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
        raise UserError(
            f"step {number + 1}: the loss is {loss.item()} and the gradient norm {norm.item()}, so the run was stopped; "
            "try a lower learning_rate or warmup_steps"
        )
