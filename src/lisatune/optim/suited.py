"""Which optimizers keep LISA's promise, and how several are seen as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lisatune.errors import UserError
from lisatune.optim.adamw import AdamW
from lisatune.optim.rounded import RoundedOptimizer

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


def each_of(optimizer: Optimizers) -> tuple[torch.optim.Optimizer, ...]:
    """One optimizer, or several, such as Muon for the hidden matrices and AdamW for the rest; without their wrappers."""
    return tuple(_innermost(one) for one in (optimizer if isinstance(optimizer, Sequence) else [optimizer]))


def check_suited(optimizer: torch.optim.Optimizer, state_policy: str, *, strided: bool = False) -> None:
    """Refuse an optimizer that would move frozen weights, or whose count of steps is not that of a layer.

    Args:
        optimizer: Whatever is to train.
        state_policy: That of the engine.
        strided: Whether it gets parameters that are not contiguous. A fused kernel would write to other elements.
    Raises: UserError naming the optimizer and what to use instead.
    """
    name = type(optimizer).__name__
    if not hasattr(optimizer, "param_groups"):
        raise UserError(f"{name} is not an optimizer: give one torch.optim.Optimizer, or a list of several")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UserError("LBFGS moves all parameters along one direction, frozen ones too: use AdamW or SGD with LISA")
    if any("weight_sum" in group for group in optimizer.param_groups):
        raise UserError(
            f"{name} counts steps for all parameters together, so a layer that is sampled late would take huge "
            "steps: use AdamW with a learning rate schedule"
        )
    for kind in ("spectral", "factored"):
        if any(group.get(kind) for group in optimizer.param_groups) and not isinstance(optimizer, AdamW):
            raise UserError(f"{name} has no {kind} step: use lisatune.AdamW for groups with {kind}=True")
    knows_strides = isinstance(optimizer, RoundedOptimizer | AdamW) or type(optimizer).__module__.startswith(
        "torch.optim"
    )
    if strided and (not knows_strides or any(group.get("fused") for group in optimizer.param_groups)):
        fused = "fused " if knows_strides else ""
        raise UserError(
            f"{fused}{name} may take the columns of a matrix for contiguous: use lisatune.AdamW or torch's AdamW with "
            "fused=False (optim='adamw_torch' in a Trainer), or leave slices_of out"
        )
    if isinstance(optimizer, torch.optim.RAdam) and state_policy != "keep":
        raise UserError(
            "RAdam warms up again whenever state is dropped, so decoder layers would hardly move: use AdamW, or "
            "state_policy=keep"
        )


def _innermost(optimizer: Any) -> Any:
    """What accelerate and others have wrapped."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def drop_state(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> None:
    """Forget what ``optimizer`` holds of ``parameter``.

    Raises: UserError if it does not let go, as an optimizer made of several may not.
    """
    optimizer.state.pop(parameter, None)
    if parameter in optimizer.state:
        raise UserError(
            f"{type(optimizer).__name__} keeps optimizer state that cannot be dropped: give its optimizers as a list"
        )


def state_device(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> torch.device:
    """Where ``optimizer`` wants the moments of ``parameter`` while it trains: with it, or where ``AdamW`` says."""
    chosen = optimizer.state_device if isinstance(optimizer, AdamW) else None
    return chosen or parameter.device


def move_state(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, device: torch.device) -> None:
    """Move the moments of ``parameter``; step counters are left where the optimizer wants them."""
    state = optimizer.state.get(parameter, {})
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.ndim > 0:
            state[key] = value.to(device)
