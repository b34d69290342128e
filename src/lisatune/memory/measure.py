"""Bytes that a run really holds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from lisatune.memory.blocks import is_view
from lisatune.memory.ledger import Ledger
from lisatune.processes.tensors import local


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
    """Bytes of ``tensors``, each object counted once, views of others not at all; of one in shards those of this process."""
    whole = {id(t): t for t in tensors if not is_view(t)}
    return sum(local(t).numel() * t.element_size() for t in whole.values())


def allocated_peak(work: Callable[[], object]) -> int:
    """The most bytes that PyTorch's CPU allocator gives out, less what it takes back, while ``work`` runs.

    Cost: the profiler keeps every allocation, so this is for measurements and tests.
    Example:
        >>> allocated_peak(lambda: torch.zeros(256))
        1024
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


class PeakMeter:
    """The most that was held since the meter was made.

    On a CUDA device that is what PyTorch had allocated. On a CPU it is what the process had resident, Python and its
    libraries included: ``base_bytes`` is what was resident when the meter was made, 0 on CUDA. A forecast knows of tensors
    alone, so on a CPU these are counted too, where ``counting`` says.

    Args:
        device: Where the model computes.
        own_bytes: Bytes resident already that belong to what is measured (a model that is loaded).
    Attributes:
        tensor_bytes: The most that tensors held where they were counted; 0 on CUDA, where ``bytes`` says it.
    Example:
        >>> meter = PeakMeter(torch.device("cpu"))
        >>> held = torch.ones(2**22)
        >>> meter.bytes() - meter.base_bytes >= 2**23  # 16 MiB are asked for; the system may have had some to spare
        True
    """

    def __init__(self, device: torch.device, own_bytes: int = 0) -> None:
        self.device = device
        self.tensor_bytes = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.base_bytes = 0
        else:
            _reset_peak_of_process()
            self.base_bytes = max(0, _resident_bytes("VmRSS") - own_bytes)

    @contextmanager
    def counting(self, held: Iterable[torch.Tensor]) -> Iterator[None]:
        """Count the tensors made inside, beside those that are ``held`` already.

        Cost: some microseconds for each operation.
        Example:
            >>> meter = PeakMeter(torch.device("cpu"))
            >>> with meter.counting([torch.ones(10)]):
            ...     made = (torch.ones(5) * 2).sum()
            >>> meter.tensor_bytes  # 10 held, two of 5, and their sum when one of these is gone
            80
        """
        with Ledger(granularity=1, device_type=self.device.type) as ledger:
            for tensor in held:
                ledger.book(tensor, "held")
            yield
        self.tensor_bytes = max(self.tensor_bytes, ledger.peak_bytes)

    def bytes(self) -> int:
        """The peak so far, ``base_bytes`` included."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _resident_bytes("VmHWM")


def _reset_peak_of_process() -> None:
    with suppress(OSError):  # not Linux, or not allowed: the peak is then that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def _resident_bytes(entry: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process; on macOS always the peak."""
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(entry)) * 1024
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        memory = psutil.Process().memory_info()
        return int(memory.rss if entry == "VmRSS" else getattr(memory, "peak_wset", memory.rss))
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, others in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
