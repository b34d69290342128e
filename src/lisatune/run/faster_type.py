"""Whether bfloat16 would be faster on this CPU, found by trying. It is told and never chosen: bits would depend on a clock."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch

from lisatune.settings import TrainConfig

WIDEST_OF_SMALL = 256  # products of narrower models are no large part of a step
CLEARLY = 0.6  # of the time in float32; a step has more than products
OPERATIONS = 10**9  # of a product and its gradients, which take some 20 ms on a core
TURNS = 3


def advice(config: TrainConfig, device: torch.device, model_config: Any) -> str:
    """What to tell of bfloat16 to who left ``dtype`` open; empty if it is not clearly faster.

    Cost: a fifth of a second on a CPU; nothing elsewhere.
    """
    text = model_config.get_text_config()
    width, inner = (getattr(text, name, None) for name in ("hidden_size", "intermediate_size"))
    if device.type != "cpu" or config.dtype != "auto" or config.full_determinism:
        return ""
    if not (isinstance(width, int) and isinstance(inner, int) and width >= WIDEST_OF_SMALL):
        return ""
    share = share_of_time(min(width, 1024), min(inner, 4096))
    if share > CLEARLY:
        return ""
    return (
        f"dtype=bfloat16 may be faster here: this model's products take {share:.2f} of the time that they take in float32; "
        "auto is float32 on a CPU"
    )


def share_of_time(width: int, inner: int) -> float:
    """Time of a product and its gradients in bfloat16, as a share of that in float32: the median of turns.

    Example:
        >>> 0 < share_of_time(256, 256)
        True
    """
    tokens = max(16, min(512, OPERATIONS // (6 * width * inner)))
    runs = {}
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.ones(tokens, width, dtype=dtype, requires_grad=True)
        weight = torch.ones(inner, width, dtype=dtype, requires_grad=True)
        runs[dtype] = rows, weight, torch.ones(tokens, inner, dtype=dtype)
    shares = []
    for _ in range(TURNS + 1):
        seconds = []
        for rows, weight, grad in runs.values():
            begun = time.perf_counter()
            torch.autograd.grad(torch.nn.functional.linear(rows, weight), (rows, weight), grad)
            seconds.append(time.perf_counter() - begun)
        shares.append(seconds[1] / seconds[0])
    return median(shares[1:])
