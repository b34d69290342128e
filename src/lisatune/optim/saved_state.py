"""Saved optimizer state put back where an optimizer holds it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lisatune.errors import UserError
from lisatune.optim.adamw import AdamW
from lisatune.optim.suited import move_state


def place_state(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, saved: dict[str, Any]) -> None:
    """Copy the saved state of ``parameter`` to where ``optimizer`` holds it; of a frozen parameter, to the CPU.

    Raises: UserError if it was saved of another parameter or another optimizer; KeyError if half of it is missing.
    """
    if isinstance(optimizer, AdamW):
        optimizer.place_state(parameter, saved)
    else:
        _check_shapes(optimizer, parameter, saved)
        fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        here, counter = parameter.device, parameter.device if fused else torch.device("cpu")
        optimizer.state[parameter] = {
            key: value.to(here if value.ndim else counter, copy=True) if isinstance(value, Tensor) else value
            for key, value in saved.items()
        }
    if not parameter.requires_grad:
        move_state(optimizer, parameter, torch.device("cpu"))  # state_policy=keep


def _check_shapes(optimizer: torch.optim.Optimizer, parameter: Tensor, saved: dict[str, Any]) -> None:
    """Refuse saved state of another parameter, or half of one; of an optimizer but PyTorch's AdamW nothing is known."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return
    if saved.keys() != {"step", "exp_avg", "exp_avg_sq"}:
        raise UserError(
            f"the saved state of a parameter holds {', '.join(sorted(saved))[:200]}, which is not AdamW's: resume with the optimizer that saved it"
        )
    for name, value in saved.items():
        shape = torch.Size() if name == "step" else parameter.shape
        if not isinstance(value, Tensor) or value.shape != shape:
            raise UserError(
                f"the saved {name[:80]} does not have the shape {tuple(shape)}: load the state that was saved for this model"
            )
