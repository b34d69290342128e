"""Bytes that processes send each other, counted where PyTorch hands them over."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# of n bytes among r processes, the share that each sends if they stand in a ring, as NCCL's and gloo's large messages go
RING = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}  # times n * (r - 1) / r
KINDS = {"allreduce_": "all_reduce", "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter"}


class Wire(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is sent while it is entered.

    Attributes:
        payload_bytes: Kind to bytes of whole tensors: what is summed by an ``all_reduce`` or ``reduce_scatter``, what
            an ``all_gather`` gives. Messages of at most ``small_bytes``, such as a loss, are counted under ``small``.
        sent_bytes_of: Kind to bytes that this process sends if the processes stand in a ring.
    Cost: some microseconds for each operation.
    """

    def __init__(self, small_bytes: int = 64) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.small_bytes = small_bytes
        self.payload_bytes: Counter[str] = Counter()
        self.sent_bytes_of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: Any) -> None:
        leaves = tree_leaves(args)
        size = max((t.numel() * t.element_size() for t in leaves if isinstance(t, Tensor)), default=0)
        kind = KINDS.get(func._schema.name.partition("::")[2], "other")
        groups = [g for g in leaves if isinstance(g, torch.ScriptObject) and "ProcessGroup" in str(g._type())]  # type: ignore[attr-defined]
        self.payload_bytes["small" if size <= self.small_bytes else kind] += size
        if groups and kind in RING:
            num_ranks = torch.distributed.ProcessGroup.unbox(groups[0]).size()  # type: ignore[attr-defined]
            self.sent_bytes_of[kind] += round(RING[kind] * size * (num_ranks - 1) / num_ranks)
