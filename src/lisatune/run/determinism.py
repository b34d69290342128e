"""Runs that give the same bits: what is asked of PyTorch and MKL for it, and what they answer."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lisatune.common.equal_sums import EQUAL_SUMS, VARIABLE, ask_for_equal_sums, processor_name
from lisatune.errors import UserError

MKL_MODES = {
    1: "off",
    2: "AUTO",
    3: "COMPATIBLE",
}  # values of mkl_cbwr_get; all others are kinds of vector instructions
# rows and columns of the first factor, columns of the second: small and narrow products, in which a difference was seen, and
# two that are not small
SHAPES = ((1, 32, 32), (2, 32, 32), (8, 8, 8), (128, 64, 1), (16, 32, 96), (128, 64, 192))
ALIGNED = 64  # bytes; PyTorch's own tensors begin at multiples of it


def be_deterministic(device: torch.device) -> None:
    """Make equal runs give equal bits on ``device``: deterministic kernels, and sums that depend on the numbers alone.

    Acts on the whole process. On a CPU it is tried out: small products are made at all alignments and compared, which takes
    about a tenth of a second.

    Raises: UserError if MKL has multiplied in this process already, so that it is too late for its mode; or if products on
        this processor still depend on where the numbers are in memory.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # PyTorch's notes on reproducibility ask for it
    torch.use_deterministic_algorithms(True)
    if device.type != "cpu":
        return
    if has_mkl():
        was_set = ask_for_equal_sums()
        mode = mkl_mode()
        if mode != EQUAL_SUMS and not (mode is None and was_set):
            raise UserError(
                "full_determinism=true comes too late, because this process has already multiplied matrices; set "
                f"{VARIABLE}={EQUAL_SUMS} in the environment before Python starts"
            )
    uneven = next(uneven_products(), None)
    if uneven is not None:
        raise UserError(
            f"full_determinism=true does not work here: with {blas()} on {processor_name()}, the bits of the product {uneven} "
            "depend on memory addresses; leave it out, or train on another machine"
        )


def has_mkl() -> bool:
    """Whether this PyTorch multiplies with MKL on a CPU."""
    return bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]


def mkl_mode() -> str | None:
    """The mode that MKL multiplies in, settled from now on; None if it cannot be asked, as where it is a library of its own."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        ask = ctypes.CDLL(str(library)).mkl_serv_cbwr_get
    except (OSError, AttributeError):
        return None
    branch = int(ask(1))
    return MKL_MODES.get(branch, f"branch {branch}")


def blas() -> str:
    """The library that multiplies on the CPU, and its mode.

    Example:
        >>> bool(blas())
        True
    """
    built = torch.__config__.show()
    if not has_mkl():
        found = re.search(r"BLAS_INFO=(\w+)", built)
        return found[1] if found else "unknown"
    found = re.search(r"Math Kernel Library Version ([\d.]+)", built)
    mode = mkl_mode() or os.environ.get(VARIABLE, "unknown")
    return f"MKL {found[1] if found else 'of unknown version'}, {VARIABLE} {mode}"


@dataclass(frozen=True)
class Uneven:
    """A product of which the bits depend on where its factors begin in memory.

    Attributes:
        shape: (M, K, N), of a product of (M, K) and (K, N).
        by_columns: Which of the two factors are laid out by columns; the others are by rows.
        starts: Bytes after a multiple of 64 at which one of them began when other bits came out.
        difference: The largest, of products of standard normal numbers.
    """

    shape: tuple[int, int, int]
    by_columns: tuple[bool, bool]
    starts: tuple[int, ...]
    difference: float

    def __str__(self) -> str:
        rows, inner, columns = self.shape
        left, right = ("by columns" if by_columns else "by rows" for by_columns in self.by_columns)
        return f"({rows}, {inner}) {left} x ({inner}, {columns}) {right}"


def uneven_products(
    dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, int, int]] = SHAPES
) -> Iterator[Uneven]:
    """Make each product with its factors at every alignment and in every layout, and say which bits depend on the alignment.

    Cost: 31 products for each layout of each shape.
    """
    random = torch.Generator().manual_seed(0)
    starts = range(dtype.itemsize, ALIGNED, dtype.itemsize)
    for shape in shapes:
        left = torch.randn(shape[:2], generator=random).to(dtype)
        right = torch.randn(shape[1:], generator=random).to(dtype)
        for by_columns in ((False, False), (False, True), (True, False), (True, True)):
            one, other = (partial(placed, factor, by) for factor, by in zip((left, right), by_columns, strict=True))
            expected = one(0) @ other(0)
            apart = {start: _apart(expected, one(start) @ other(0), one(0) @ other(start)) for start in starts}
            if any(apart.values()):
                yield Uneven(shape, by_columns, tuple(s for s, size in apart.items() if size), max(apart.values()))


def _apart(expected: Tensor, *others: Tensor) -> float:
    return max((other.float() - expected.float()).abs().max().item() for other in others)


def placed(matrix: Tensor, by_columns: bool, start: int) -> Tensor:
    """A copy of ``matrix`` that begins ``start`` bytes after a multiple of 64, laid out by rows or by columns."""
    stored = matrix.T if by_columns else matrix
    size = stored.element_size()
    buffer = torch.empty(stored.numel() + ALIGNED // size, dtype=stored.dtype)
    first = (start - buffer.data_ptr()) % ALIGNED // size
    copy = buffer[first : first + stored.numel()].view(stored.shape).copy_(stored)
    return copy.T if by_columns else copy
