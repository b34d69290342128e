"""Something done once a step, when all its gradients are there and nobody has changed them yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class AfterBackward:
    """Calls ``function`` at the end of a step's last backward pass, before gradients are clipped.

    The Trainer has no event there. The first gradient that arrives asks autograd for a call at the end of the pass, as
    DistributedDataParallel does. In the earlier passes of an accumulation window nothing is called.

    Args:
        model: Whose gradients are waited for. Call ``follow`` whenever other parameters begin to train.
        function: Called without arguments.
    Cost: a Python call for each tensor that gets a gradient.
    """

    def __init__(self, model: nn.Module, function: Callable[[], None]) -> None:
        self.model = model
        self.function = function
        self._handles: list[Any] = []
        self._queued = False

    def follow(self) -> None:
        """Watch what trains now."""
        self.remove()
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._arrived))  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Watch nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _arrived(self, _parameter: torch.Tensor) -> None:
        from accelerate.state import GradientState

        if not self._queued and GradientState().sync_gradients:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._ended)

    def _ended(self) -> None:
        self._queued = False
        self.function()
