"""Bytes that a run really holds."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable

import torch

GIB = 2**30


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state, on every device.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(10))
        >>> optimizer = torch.optim.AdamW([weight])
        >>> weight.sum().backward(); optimizer.step()
        >>> state_bytes(optimizer)  # two moments and a step counter, float32
        84
    """
    return tensor_bytes(v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of ``tensors``, each object counted once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def peak_bytes(device: torch.device) -> int:
    """The most that was held since the start: allocated on a CUDA device, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, Linux in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def gib(num_bytes: float) -> str:
    """Bytes for people: GiB, or MiB where GiB would say little.

    Example:
        >>> gib(3 * 2**29), gib(2**20)
        ('1.50 GiB', '1.0 MiB')
    """
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"
