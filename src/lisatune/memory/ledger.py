"""Every byte that a piece of PyTorch holds, booked as it comes and goes; on the meta device no byte is really held."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lisatune.memory.shapes import Shapes
from lisatune.processes.tensors import local

CUDA_GRANULARITY = 512  # the CUDA caching allocator rounds every block up to a multiple of this many bytes
HOST = "host"
GATHERED = "gathered"  # weights that other processes hold, while they are needed

GATHER = "GatherBackward0"  # whose sum PyTorch makes in place, but not while anybody follows operations

_off_device = 0


@contextmanager
def off_device() -> Iterator[None]:
    """Tensors made inside are booked as host memory, not as the device's; without a running ledger nothing happens.

    A meta tensor has no place of its own, so whoever moves something off the device on meta says it this way.
    """
    global _off_device
    _off_device += 1
    try:
        yield
    finally:
        _off_device -= 1


def _sums_gradients(func: Any) -> bool:
    """Whether autograd itself adds up two gradients of one tensor.

    It does so in place where nobody else holds the first of them. A dispatch mode, such as a ledger, keeps it from that.
    """
    in_backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()  # else a checkpoint's forward
    return in_backward and func is torch.ops.aten.add.Tensor


def _backward_of() -> str:
    """The node of autograd's graph whose backward pass runs now; empty if none does."""
    node = torch._C._current_autograd_node()  # type: ignore[attr-defined]
    return "" if node is None else str(node.name())


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages of all tensors made while it is entered, and remembers the moment when they were most.

    Each storage is booked once, under a label: that of ``label`` when it was made, ``backward`` when autograd made it,
    ``gathered`` when it was filled again, or what ``book`` says. It is struck off when the last tensor that shares it is gone, as an allocator would do it. What a
    kernel takes for itself inside of one operation is not seen, nor is what an allocator cannot use for its blocks
    being in the wrong places.

    Args:
        granularity: Bytes that the allocator rounds up to; 512 on CUDA, 1 to count exactly.
        pinned: Host memory is pinned, whose blocks torch rounds up to a power of two.
        device_type: Tensors elsewhere are not booked.
        one_memory: The host's memory is the device's, as on a CPU, so what moves there is still held.
    Attributes:
        total_bytes: Held now, host memory left out.
        host_bytes: Held now in host memory.
        host_peak_bytes: The most that was held in host memory since the start. Torch keeps pinned blocks that were let go.
        peak_bytes: The most that was held since the start, or since ``reset_peak``.
        peak: Bytes by label at that moment.
        peak_label: What was being done at that moment: the label of the last tensor made.
    Cost: some microseconds for each operation.
    Example:
        >>> with Ledger(granularity=1) as ledger:
        ...     a = torch.zeros(100, device="meta")
        ...     b = (a * 2).sum()  # the product is gone as soon as it is summed
        >>> ledger.total_bytes, ledger.peak_bytes
        (404, 804)
    """

    def __init__(
        self, granularity: int = CUDA_GRANULARITY, device_type: str = "meta", *, one_memory: bool = False,
        pinned: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()  # type: ignore[no-untyped-call]
        self.granularity = granularity
        self.device_type = device_type
        self.one_memory = one_memory
        self.pinned = pinned
        self.label = "other"
        self.total_bytes = 0
        self.host_bytes = self.host_peak_bytes = 0
        self.peak_bytes = 0
        self.peak: Mapping[str, int] = {}
        self.peak_label = ""
        self._held: Counter[str] = Counter()
        self._entries: dict[int, tuple[str, int, Any]] = {}
        self._resize = torch.UntypedStorage.resize_
        self._shapes = Shapes()

    def __enter__(self) -> Ledger:
        """FSDP2 empties and fills storages that live on, which is no operation of a tensor."""
        ledger, resize = self, self._resize

        def resized(storage: Any, size: int) -> Any:
            out = resize(storage, size)
            if storage.device.type == ledger.device_type:
                ledger._book_storage(storage, GATHERED)
                ledger._remember_peak(ledger._now())
            return out

        torch.UntypedStorage.resize_ = resized  # type: ignore[assignment, method-assign]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def book(self, tensor: Tensor, label: str) -> None:
        """Book ``tensor`` under ``label``, whether it is known already or not; what lies on the host stays there."""
        self._book_storage(local(tensor).untyped_storage(), label)

    def _book_storage(self, storage: Any, label: str) -> None:
        known = self._entries.get(id(storage))
        if known is not None and known[2]() is storage:
            if known[0] == HOST:
                return
            self._strike(id(storage))
        num_bytes = self._size(storage.nbytes(), label)
        if num_bytes == 0:
            return
        key = id(storage)
        self._entries[key] = (label, num_bytes, weakref.ref(storage, lambda _: self._strike(key)))
        self._held[label] += num_bytes
        if label == HOST:
            self.host_bytes += num_bytes
            self.host_peak_bytes = max(self.host_peak_bytes, self.host_bytes)
        else:
            self.total_bytes += num_bytes

    def _size(self, num_bytes: int, label: str) -> int:
        """What an allocator takes for ``num_bytes``."""
        if label == HOST and self.pinned:
            return 1 << (num_bytes - 1).bit_length() if num_bytes else 0
        return -(-num_bytes // self.granularity) * self.granularity

    def reset_peak(self) -> None:
        """Forget the peak so far; the next operation begins a new one."""
        self.peak_bytes, self.peak, self.peak_label = 0, {}, ""

    def _strike(self, key: int) -> None:
        label, num_bytes, _ = self._entries.pop(key, (HOST, 0, None))
        self._held[label] -= num_bytes
        if label == HOST:
            self.host_bytes -= num_bytes
        else:
            self.total_bytes -= num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.scatter_add.default and _backward_of() == GATHER:
            func = torch.ops.aten.scatter_add_.default  # into zeros made for it, as without a ledger
        out = self._shapes(func, args, kwargs or {})
        label = HOST if _off_device and not self.one_memory else self._now()
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == self.device_type:
                storage = local(leaf).untyped_storage()
                known = self._entries.get(id(storage))
                if known is None or known[2]() is not storage:
                    self.book(leaf, label)
        if not _sums_gradients(func):  # else the next operation does it, when autograd has let go of what it summed
            self._remember_peak(label)
        return out

    def _now(self) -> str:
        return "backward" if _backward_of() else self.label

    def _remember_peak(self, label: str) -> None:
        if self.total_bytes > self.peak_bytes:
            self.peak_bytes, self.peak, self.peak_label = self.total_bytes, dict(self._held), label
