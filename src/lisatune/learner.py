"""A model together with all that changes it: what one optimizer step is.

Training and the memory forecast both run this file, so the forecast forecasts what is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lisatune.data.loader import Batch
from lisatune.engine import LisaEngine
from lisatune.errors import UserError
from lisatune.layers import Layers
from lisatune.levers.frozen_steps import InactiveUpdates
from lisatune.levers.inverse_chance import InverseChance, active_chances
from lisatune.levers.offload_frozen import HostLayers
from lisatune.levers.optimizer_in_backward import StepInBackward
from lisatune.loss import batch_loss
from lisatune.methods.mezo import ZerothOrder
from lisatune.optim.adamw import AdamW
from lisatune.optim.build import clip_gradients
from lisatune.optim.row_gradients import RowGradients
from lisatune.optim.suited import move_state
from lisatune.processes.collectives import total
from lisatune.processes.sharded import Sharded
from lisatune.slices.engine import SliceEngine


class Outcome(NamedTuple):
    """Of an optimizer step: loss and global gradient norm before clipping, scalars in float32; ``bad`` if either is not
    finite or the norm is beyond the limit, and nothing was updated (unless in the backward pass)."""

    loss: Tensor
    norm: Tensor
    bad: bool


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
        device: Where the model computes.
        bad_grad_norm: A larger gradient norm makes a step bad.
        correction: If updates of drawn layers are divided by their chance.
        inactive: If frozen layers take small steps; their rate is ``inactive_ratio`` of the optimizer's.
        zeroth_order: If losses alone are looked at; the norm of a step is then that of the slopes.
        sharded: If the weights lie in shards among several processes.
    Attributes:
        touched: The parts that have trained since somebody, who saves them, last emptied this set.
    """

    model: Any
    layers: Layers
    linear_head: bool
    optimizer: torch.optim.Optimizer
    engine: LisaEngine | SliceEngine | None
    max_grad_norm: float
    row_gradients: RowGradients | None
    in_backward: StepInBackward | None
    host_layers: HostLayers | None
    device: torch.device
    bad_grad_norm: float = math.inf
    correction: InverseChance | None = None
    zeroth_order: ZerothOrder | None = None
    inactive: InactiveUpdates | None = None
    inactive_ratio: float = 0.0
    sharded: Sharded | None = None
    touched: set[str] = field(default_factory=set)

    def step(self, number: int, micro_batches: Iterable[Batch], num_labelled: int) -> Outcome:
        """Optimizer step ``number`` (from 0), at the learning rate that is set: one divisor for all its micro-batches."""
        if self.engine and self.engine.begin_step(number, self.optimizer):
            self.follow_engine()
        if self.inactive:
            self.inactive.number = number
            group = self.optimizer.param_groups[0]
            self.inactive.lr = self.inactive_ratio * group["lr"] / group.get("lr_ratio", 1.0)
        if self.zeroth_order:
            loss, norm = self.zeroth_order.probe(number, micro_batches, num_labelled)
        else:
            loss = self._backward(micro_batches, num_labelled)
        scores = self.engine.scores() if self.engine else {}
        if self.in_backward:
            self.optimizer.step()
            norm = self.in_backward.grad_norm()
            bad = self._is_bad(loss, norm)
        else:
            if not self.zeroth_order:
                norm = clip_gradients(self.optimizer, self.max_grad_norm, self.row_gradients)
            bad = self._is_bad(loss, norm)
            if not bad:
                self.optimizer.step()
        if self.engine and not bad:
            self.engine.observe(number, scores)
        self.optimizer.zero_grad()
        self.touched |= self.trained_parts
        return Outcome(loss, norm, bad)

    def _backward(self, micro_batches: Iterable[Batch], num_labelled: int) -> Tensor:
        """Gradients of all micro-batches; returns the step's loss."""
        losses: list[Tensor] = []
        if self.sharded:
            micro_batches = list(micro_batches)
        for micro in micro_batches:
            if self.sharded:
                self.sharded.set_last(micro is micro_batches[-1])  # type: ignore[index]
            loss = self.call(
                batch_loss, self.layers, micro, num_labelled, linear_head=self.linear_head,
                row_gradients=self.row_gradients,
            )  # fmt: skip
            loss.backward()
            losses.append(loss.detach())
        loss = torch.stack(losses).sum()
        return total(loss) if self.sharded else loss

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``function(*args, **kwargs)``, which runs the model: its weights have to be at hand."""
        return self.sharded.call(function, *args, **kwargs) if self.sharded else function(*args, **kwargs)

    def follow_engine(self) -> None:
        """Let all that depends on which layers train know what the engine has set."""
        if self.host_layers:
            self.host_layers.place()
        if self.correction and self.engine and self.engine.drawn is not None:
            chances = self.engine.sampler.inclusion(self.engine.interval)  # type: ignore[attr-defined]
            self.correction.set(active_chances(self.layers, self.engine.pool, self.engine.drawn, chances))

    @property
    def trained_parts(self) -> set[str]:
        """The parts that change in a step now."""
        if self.engine is None:
            return self._always_trained
        if self.engine.drawn is None:
            return set()
        moved = {part for part in self.layers.parts() if part.startswith("layers.")} if self.inactive else set()
        return self.engine.trained_parts(self.engine.drawn) | moved

    @cached_property
    def _always_trained(self) -> set[str]:
        return {part for part, own in self.layers.parts().items() if any(p.requires_grad for p in own.values())}

    def place_state(self, parameter: torch.nn.Parameter, saved: dict[str, Any]) -> None:
        """Copy saved optimizer state to where the optimizer and the engine hold that of ``parameter``."""
        if isinstance(self.optimizer, AdamW):
            self.optimizer.place_state(parameter, saved)
        else:
            _check_shapes(self.optimizer, parameter, saved)
            fused = any(group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups)
            here, counter = parameter.device, parameter.device if fused else torch.device("cpu")
            self.optimizer.state[parameter] = {
                key: value.to(here if value.ndim else counter, copy=True) if isinstance(value, Tensor) else value
                for key, value in saved.items()
            }
        if not parameter.requires_grad:
            move_state(self.optimizer, parameter, torch.device("cpu"))  # state_policy=keep

    def _is_bad(self, loss: Tensor, norm: Tensor) -> bool:
        if loss.is_meta:
            return False  # there are no values
        return not (math.isfinite(loss.item()) and math.isfinite(norm.item()) and norm.item() <= self.bad_grad_norm)


def _check_shapes(optimizer: torch.optim.Optimizer, parameter: Tensor, saved: dict[str, Any]) -> None:
    """Refuse saved state of another parameter, or half of one; of an optimizer but PyTorch's AdamW nothing is known."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return
    if saved.keys() != {"step", "exp_avg", "exp_avg_sq"}:
        raise UserError(f"the saved state of a parameter holds {', '.join(sorted(saved))[:200]}, which is not AdamW's")
    for name, value in saved.items():
        shape = torch.Size() if name == "step" else parameter.shape
        if not isinstance(value, Tensor) or value.shape != shape:
            raise UserError(f"the saved {name[:80]} is not of the shape {tuple(shape)}, so it is of another parameter")
