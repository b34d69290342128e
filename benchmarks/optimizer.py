"""AdamW's arithmetic, plain and compiled: nanoseconds for an element, kernels and bytes of a block, seconds to compile.

python benchmarks/optimizer.py [--elements 1048576] [--rounds 15]

One block of one weight, as `optim_compile=true` makes it and as it is without. Both take their steps by turns; the ratio is
taken round by round. Times are the process's own on one core. Kernels of the plain one are the operations that PyTorch
dispatches. Bytes are those of all their inputs and outputs; a cache keeps part of them. Of the compiled one they are its
arguments and what it holds between its loops, each written and read once. Seconds to compile are a processor's, the C++
compiler's too, with nothing in the cache, which later runs find. 0 bits is the step without moments, which slices take
that train for one step.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from typing import Any

import torch
from results import markdown, processor_seconds, write_page
from torch import Tensor
from torch._inductor import metrics
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lisatune import AdamW

CASES = [(torch.bfloat16, 32), (torch.bfloat16, 16), (torch.bfloat16, 8), (torch.bfloat16, 0), (torch.float32, 32), (torch.float32, 16), (torch.float32, 8)]  # fmt: skip
VIEWS = ("view", "detach", "slice", "alias", "empty", "reshape", "unsqueeze", "item", "_local_scalar_dense", "select")


class Counted(TorchDispatchMode):
    """Operations that read or write, and their bytes."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.kernels, self.bytes = least, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        moved = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor) and t.numel() >= self.least]
        if moved and func.overloadpacket.__name__ not in VIEWS:
            self.kernels += 1
            self.bytes += sum(t.nbytes for t in moved)
        return out


class Contender:
    """A weight and its optimizer."""

    def __init__(self, dtype: torch.dtype, bits: Any, elements: int, compiled: bool) -> None:
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(elements // 1024, 1024).to(dtype))
        self.grad = torch.randn_like(self.weight)
        self.optimizer = AdamW(
            [self.weight], weight_decay=0.1, state_bits=bits or 32, stateless=not bits, compiled=compiled
        )
        self.seconds: list[float] = []

    def step(self) -> None:
        self.weight.grad = self.grad
        begun = time.process_time()
        self.optimizer.step()
        self.seconds.append(time.process_time() - begun)


def held_between(code: str, elements: int) -> int:
    """Bytes that generated code makes for a block beside its arguments."""
    total = 0
    for shape, kind in re.findall(r"empty_strided_cpu\(\((.*?), \), .*?torch\.(\w+)\)", code):
        count = eval(re.sub(r"\bs\d+\b", str(elements), f"({shape},)"), {}, {})
        size = 1
        for number in count:
            size *= number
        total += size * torch.empty((), dtype=getattr(torch, kind)).element_size()
    return total


def case(dtype: torch.dtype, bits: int, options: argparse.Namespace) -> list[object]:
    """A row of the table."""
    plain, fast = (Contender(dtype, bits, options.elements, compiled) for compiled in (False, True))
    metrics.reset()
    begun = processor_seconds()
    _, codes = run_and_get_code(fast.step)
    compiled_in = processor_seconds() - begun
    for _ in range(options.rounds):
        plain.step()
        fast.step()
    ratios = [b / a for a, b in zip(plain.seconds[2:], fast.seconds[3:], strict=False)]
    with Counted(1024) as counted:
        plain.step()
    arguments = sum(t.nbytes for t in fast.optimizer.state[fast.weight].values() if t.numel() > 1) + fast.weight.nbytes
    # around the kernel: the gradient is cast to float32; or weights and gradients are joined and parted, with numbers for noise
    around, bytes_around = (4, 26) if not bits else (0, 0) if dtype == torch.float32 else (1, 6)
    between = sum(held_between(code, options.elements) for code in codes)
    moved = 2 * arguments + (4 + bytes_around) * options.elements + 2 * between
    ns = [1e9 * statistics.median(c.seconds[2:]) / options.elements for c in (plain, fast)]
    return [
        str(dtype)[6:], bits, *(f"{t:.2f}" for t in ns), f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        counted.kernels, sum(len(re.findall(r"async_compile\.cpp", code)) for code in codes) + around,
        f"{counted.bytes / options.elements:.0f}", f"{moved / options.elements:.0f}", f"{compiled_in:.0f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=2**20)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    head = ["weights", "bits of a moment", "ns an element", "compiled", "ratio, median (least to most)", "kernels a block", "compiled",
            "bytes an element", "compiled", "s to compile"]  # fmt: skip
    with torch._inductor.config.patch(force_disable_caches=True, compile_threads=1):
        rows = [case(dtype, bits, options) for dtype, bits in CASES]
    print(write_page("optimizer", markdown(head, rows), __doc__ or ""))


if __name__ == "__main__":
    main()
