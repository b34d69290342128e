"""Copies between the device and host memory.

The same code runs on CUDA (pinned memory, copies beside the compute), on the CPU (host and device are one memory: plain
copies) and on the meta device (no data: a planner follows the storages, those of host memory inside ``off_device``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from lisatune.memory.ledger import off_device


def to_host(tensor: Tensor) -> Tensor:
    """A copy of ``tensor`` in host memory, outside autograd; same shape, dtype, strides and bytes.

    From CUDA it is pinned and does not block: the values are there once the current stream has come so far, so
    synchronise before the CPU reads them; ``to_device`` on the same stream needs nothing. Pinned blocks are rounded up
    to a power of two by torch's allocator.

    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> copy = to_host(weight)
        >>> copy.tolist(), copy.requires_grad, copy.data_ptr() == weight.data_ptr()
        ([1.0, 1.0], False, False)
    """
    tensor = tensor.detach()
    if tensor.device.type == "cuda":
        # copy_ marks the pinned block as used by the stream, so it is not handed out again before the copy is done
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    if tensor.device.type == "meta":
        with off_device():
            return torch.empty_like(tensor)
    return tensor.clone()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of the host tensor ``tensor`` on ``device``, outside autograd; does not block from pinned to CUDA memory.

    Example:
        >>> copy = to_device(torch.ones(2), torch.device("cpu"))
        >>> copy.tolist(), to_device(copy, torch.device("meta")).device.type
        ([1.0, 1.0], 'meta')
    """
    tensor = tensor.detach()
    if device.type == "meta":
        return torch.empty_like(tensor, device=device)
    return tensor.to(device, non_blocking=True, copy=True)


def host_zeros(shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Zeros in host memory for a state that belongs to ``like``: pinned if ``like`` is on CUDA, meta if it is on meta.

    Example:
        >>> host_zeros((2,), torch.float32, like=torch.ones(3))
        tensor([0., 0.])
    """
    if like.device.type == "meta":
        with off_device():
            return torch.zeros(tuple(shape), dtype=dtype, device="meta")
    return torch.zeros(tuple(shape), dtype=dtype, device="cpu", pin_memory=like.device.type == "cuda")


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The one stream for copies of a CUDA device, the same at each call; None for other devices.

    Example:
        >>> side_stream(torch.device("cpu")) is None
        True
    """
    if device.type != "cuda":
        return None
    return _side_stream(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _side_stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]


class Shuttle:
    """Sends tensors to host memory and fetches them back, while the device computes.

    ``prefetch`` starts the copies that the next ``fetch`` will ask for. One set of tensors is on its way at a time,
    each way: the device holds what was fetched last, what is prefetched and what was sent last, and no more. On the CPU
    nothing is prefetched or held, because an early copy would only take memory; meta does as CUDA does, so that a
    planner sees the same lifetimes.

    Why no ``record_stream``: it gives memory back only when the device has come so far, so a CPU that runs ahead would
    find none given back, and the peak would be that of a run without offloading. Instead all device memory is the compute
    stream's own, which orders its uses by itself, and the side stream touches it only between two waits:

    - before it reads or writes there, the side stream waits for all compute queued so far;
    - before that memory is used or given back, the compute stream waits for the copy. Until the next call has said so,
      what was sent is held here; it must not be written to before.

    Args:
        device: Where the compute is; all calls come from its compute stream.
    Example:
        >>> shuttle = Shuttle(torch.device("cpu"))
        >>> a, b = shuttle.send(torch.ones(1)), shuttle.send(torch.zeros(1))
        >>> shuttle.prefetch([b])
        >>> shuttle.fetch([b]), shuttle.fetch([a])
        ([tensor([0.])], [tensor([1.])])
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._leaving: Tensor | None = None
        self._left: torch.cuda.Event | None = None
        self._sources: list[Tensor] = []
        self._versions: list[int] = []
        self._coming: list[Tensor] = []
        self._came: torch.cuda.Event | None = None
        self._stream = side_stream(device)

    def __reduce__(self) -> tuple[type[Shuttle], tuple[torch.device]]:
        return Shuttle, (self.device,)  # a copy of whoever holds this begins with nothing on its way

    def __del__(self) -> None:
        self.drop()  # a copy that nobody waited for must not go on writing to memory that is given back

    def send(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` in host memory, for ``fetch`` alone to read."""
        self._release()
        if self._stream is None:
            host = to_host(tensor)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                host = to_host(tensor)
            self._left = self._stream.record_event()
        if self.device.type != "cpu":
            self._leaving = tensor.detach()  # its storage, not the graph that made it
        return host

    def prefetch(self, tensors: Sequence[Tensor]) -> None:
        """Start to copy the host tensors ``tensors``; what was prefetched before and not fetched is dropped."""
        if self.device.type != "cpu":
            self._start(tensors)

    def fetch(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of the host tensors ``tensors`` on the device: those prefetched, if none was written to since."""
        self._release()
        prefetched = len(self._sources) == len(tensors) and all(
            ours is theirs and version == theirs._version
            for ours, version, theirs in zip(self._sources, self._versions, tensors, strict=True)
        )
        if not prefetched:
            self._start(tensors)
        copies = self._coming
        self.drop()
        return copies

    def drop(self) -> None:
        """Forget what was prefetched; for when host tensors get other values."""
        if self._came is not None:
            torch.cuda.current_stream(self.device).wait_event(self._came)
        self._sources, self._versions, self._coming, self._came = [], [], [], None

    def _start(self, tensors: Sequence[Tensor]) -> None:
        self.drop()  # first, so that two sets never lie here at once
        if self._stream is None:
            self._coming = [to_device(t, self.device) for t in tensors]
        else:
            self._coming = [torch.empty_like(t, device=self.device) for t in tensors]
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                for copy, tensor in zip(self._coming, tensors, strict=True):
                    copy.copy_(tensor.detach(), non_blocking=True)
            self._came = self._stream.record_event()
        # last, so that nothing counts as fetched when the device was out of memory
        self._sources, self._versions = list(tensors), [t._version for t in tensors]

    def _release(self) -> None:
        if self._left is not None:
            torch.cuda.current_stream(self.device).wait_event(self._left)
        self._leaving = self._left = None
