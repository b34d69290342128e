"""A model together with all that changes it: what one optimizer step is.

Training and the memory forecast both run this file, so the forecast forecasts what is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lisatune.data.loader import Batch
from lisatune.engine import LisaEngine
from lisatune.layers import Layers
from lisatune.levers.base import Lever
from lisatune.loss import batch_loss
from lisatune.methods.base import Method
from lisatune.optim.build import clip_gradients
from lisatune.optim.row_gradients import RowGradients
from lisatune.placement.base import OnDevice
from lisatune.slices.engine import SliceEngine


class Outcome(NamedTuple):
    """What came of an optimizer step: loss and global gradient norm before clipping, float32 scalars on the CPU.

    ``bad`` if either is not finite or the norm is beyond the limit; then nothing was updated (unless in the backward pass).
    """

    loss: Tensor
    grad_norm: Tensor
    bad: bool


@dataclass(kw_only=True)
class Learner:
    """Takes optimizer steps.

    Args:
        model: The whole model, adapters included.
        method: What trains, and where its gradient comes from.
        optimizer: Over all parameters that ever train.
        levers: What was put on from outside, in order.
        placement: Where the weights are.
        max_grad_norm: Global norm that gradients are clipped to; 0 does not clip.
        bad_grad_norm: A larger gradient norm makes a step bad.
    Attributes:
        rows: Gradients of embedding and head, if they are made a block at a time.
        loss: What is computed of a micro-batch; ``batch_loss``, unless a task has another.
        trained_at: Parts to the number of the last step in which they trained.
    """

    model: Any
    method: Method
    optimizer: torch.optim.Optimizer
    levers: Sequence[Lever]
    placement: OnDevice
    max_grad_norm: float = 0.0
    bad_grad_norm: float = math.inf
    rows: RowGradients | None = None
    loss: Callable[..., Tensor] = batch_loss
    trained_at: dict[str, int] = field(default_factory=dict)

    def step(self, number: int, micro_batches: Iterable[Batch], num_labelled: int) -> Outcome:
        """Optimizer step ``number`` (from 0), at the learning rate that is set: one divisor for all its micro-batches."""
        if self.method.begin_step(number, self.optimizer):
            self.after_switch()
        for lever in self.levers:
            lever.before_step(self, number)
        loss, norm = on_host(*self.method.gradients(self, micro_batches, num_labelled))
        bad = self.is_bad(loss, norm)
        self.update(bad)
        self.placement.after_step()
        self.method.observe(number, bad)
        self.optimizer.zero_grad()
        self.trained_at |= dict.fromkeys(self.trained_parts, number)
        return Outcome(loss, norm, bad)

    def backward(self, micro_batches: Iterable[Batch], num_labelled: int) -> Tensor:
        """Gradients of all micro-batches; returns the step's loss."""
        losses: list[Tensor] = []
        for micro in self.placement.passes(micro_batches):
            loss = self.call(
                self.loss, self.layers, micro, num_labelled, linear_head=self.linear_head, row_gradients=self.rows
            )
            loss.backward()
            losses.append(loss.detach())
        self.sum_gradients()
        return self.placement.total(torch.stack(losses).sum())

    def sum_gradients(self) -> None:
        """Sum whole gradients over the processes, not those made in blocks. ``optimizer_in_backward`` replaces this."""
        in_blocks = () if self.rows is None else self.rows
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        self.placement.sum_gradients(p for p in parameters if p.grad is not None or p not in in_blocks)

    def clip(self) -> Tensor:
        """Clip the gradients; returns their norm before. ``optimizer_in_backward`` replaces this."""
        return clip_gradients(self.optimizer, self.max_grad_norm, self.rows)

    def is_bad(self, loss: Tensor, norm: Tensor) -> bool:
        """Whether the step must not be taken."""
        if loss.is_meta:
            return False  # there are no values
        return not (math.isfinite(loss.item()) and math.isfinite(norm.item()) and norm.item() <= self.bad_grad_norm)

    def update(self, bad: bool) -> None:
        """Update what has a gradient, unless the step is ``bad``. ``optimizer_in_backward`` replaces this."""
        if not bad:
            self.optimizer.step()

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``function(*args, **kwargs)``, which runs the model: its weights have to be at hand."""
        return self.placement.call(function, *args, **kwargs)

    def after_switch(self) -> None:
        """Tell everything that depends on which parameters train that they have changed."""
        self.placement.after_switch()
        for lever in self.levers:
            lever.after_switch(self)

    @property
    def layers(self) -> Layers:
        """The parts of the model."""
        return self.method.layers

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.placement.device

    @property
    def linear_head(self) -> bool:
        """Whether the logits are a product with the head, and nothing more."""
        return self.method.linear_head

    @property
    def engine(self) -> LisaEngine | SliceEngine | None:
        """LISA's engine, if the method has one."""
        return self.method.engine

    @property
    def trained_parts(self) -> set[str]:
        """The parts that change in a step now."""
        return self.method.trained_parts().union(*(lever.also_trains(self) for lever in self.levers))


def on_host(*scalars: Tensor) -> tuple[Tensor, ...]:
    """``scalars`` in float32 on the CPU, by one copy: the only time in a step that the CPU waits for the device."""
    if scalars[0].is_meta:
        return scalars
    device = scalars[0].device
    return torch.stack([scalar.detach().to(device, torch.float32) for scalar in scalars]).cpu().unbind()
