"""The arithmetic of a block of ``AdamW`` as one compiled kernel. ``AdamW.update`` is its plain equal."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lisatune.common.compiler import compiling
from lisatune.optim.moments import GROUP, Moments
from lisatune.optim.rounding import bits_of_keys, bits_of_spread, round_stochastically

LEAST = 2 * GROUP  # elements of the smallest block: a length of one group would be compiled by itself


def fits(start: int, stop: int) -> bool:
    """Whether the compiled kernel takes this block: whole groups, so that all lengths share one kernel.

    The rest, the end of a tensor and short vectors, is updated as without it.

    Example:
        >>> fits(0, 512), fits(512, 1000), fits(0, 256)
        (True, False, False)
    """
    return stop - start >= LEAST and (stop - start) % GROUP == 0


def update_block(
    moments: Moments,
    weight: Tensor,
    grad: Tensor,
    held: dict[str, Tensor],
    numbers: list[float],
    keys: list[tuple[int, int]],
) -> None:
    """Update ``weight`` and the moments ``held`` in place, in one or two kernels.

    The same as the loop of ``AdamW.update``, but a sum and a product may be rounded apart where that rounds them together.
    A moment then differs by one rounding of float32, and of a million bfloat16 weights about one is rounded to its other
    neighbour. The noise is the same to the bit.

    Args:
        moments: How the moments are held.
        weight: The block's weights, (n,); ``fits`` says which n.
        grad: Its gradient, (n,), any type.
        held: What ``Moments.walk`` gave.
        numbers: Factor of the decay, 1 - beta1, beta2, 1 - beta2, correction of the second moment, eps, and the rate over
            the correction of the first.
        keys: Two pairs of ``rounding.keys_of``, for the weights and for the moments.
    Raises: UserError if there is no compiler.
    Cost: compiled once for each type of weights, gradient and moments: 2 to 5 s of work for Python, and a C++ compiler's.
    """
    there = _on(weight.device, numbers), _on(weight.device, keys, torch.int32)
    # .data is no view: of views, the shape of what they show would be compiled in
    parts = {name: tensor.data for name, tensor in held.items()}
    # who counts tensors would be given other kernels, and so other bits
    with _disable_current_modes(), compiling("optim_compile", weight.device.type):
        _kernel()(moments, weight.data, grad.data, parts, *there)


def no_more_than(bits: int) -> int:
    """Bytes for an element that the kernel holds beside its arguments, at most; 8 bits need two passes over a group."""
    return 13 if bits == 8 else 0


def update_stateless(weight: Tensor, grad: Tensor, spread: Tensor, numbers: list[float]) -> None:
    """The step without moments on bfloat16 ``weight``, (n,), in place and in one kernel: equal to ``AdamW``'s to the bit.

    Args:
        weight: Weights, (n,).
        grad: Their gradient, (n,), any type.
        spread: Of ``rounding.spread_of``, for all n.
        numbers: Factor of the decay, eps, and the rate with a minus.
    """
    if weight.is_meta:
        return  # a forecast: the kernel holds nothing
    with _disable_current_modes(), compiling("optim_compile", weight.device.type):
        _stateless_kernel()(weight.data, grad.data, spread, _on(weight.device, numbers))


def _on(device: torch.device, values: list[Any], dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of ``values``, since a number that changes would be compiled anew."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


@cache
def _stateless_kernel() -> Callable[..., None]:
    return torch.compile(_stateless_arithmetic, dynamic=True, fullgraph=True)


def _stateless_arithmetic(weight: Tensor, grad: Tensor, spread: Tensor, numbers: Tensor) -> None:
    decay, eps, rate = numbers.unbind()
    grad = grad.float()
    updated = weight.float() * decay + rate * grad / (grad.abs() + eps)
    weight.copy_(round_stochastically(updated, bits_of_spread(spread).bitwise_and_(0xFFFF)))


@cache
def _kernel() -> Callable[..., None]:
    return torch.compile(_arithmetic, dynamic=True, fullgraph=True)


def _arithmetic(
    moments: Moments, weight: Tensor, grad: Tensor, held: dict[str, Tensor], numbers: Tensor, keys: Tensor
) -> None:
    decay, left1, beta2, left2, correction, eps, rate = numbers.unbind()
    grad = grad.float()
    first, second = moments.load(held)
    first.lerp_(grad, left1)
    second.mul_(beta2).add_(left2 * grad * grad)
    updated = weight.float() * decay - rate * (first / ((second / correction).sqrt() + eps))
    if weight.dtype == torch.bfloat16:
        updated = round_stochastically(updated, bits_of_keys(keys[0], len(weight)).bitwise_and_(0xFFFF))
    weight.copy_(updated)
    moments.store(held, first, second, None if moments.bits == 32 else bits_of_keys(keys[1], len(weight)))


def numbers_of(group: dict[str, Any], t: float) -> list[float]:
    """The ``numbers`` of a step ``t`` (from 1) with the settings of a group."""
    beta1, beta2 = group["betas"]
    rate = group["lr"] / (1 - beta1**t)
    return [1 - group["lr"] * group["weight_decay"], 1 - beta1, beta2, 1 - beta2, 1 - beta2**t, group["eps"], rate]
