"""Asking MKL, which multiplies for PyTorch on most x86 processors, for sums that depend on the numbers alone. Needs no torch.

A sum of floats depends on the order of adding. On a processor that is not Intel's, MKL adds the small products of an attention
in another order where a matrix does not begin at a multiple of 16 bytes, or where its columns come first in memory. In the mode
COMPATIBLE it does not, on any processor; with slower kernels. MKL reads the mode once, before it first multiplies.

Reference: oneMKL Developer Guide, "Obtaining Numerically Reproducible Results" (MKL_CBWR).
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

VARIABLE, EQUAL_SUMS = "MKL_CBWR", "COMPATIBLE"


def ask_for_equal_sums() -> bool:
    """Set the mode for this process and those that it starts; whether it was set before.

    Without effect on a process that has multiplied already.
    """
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = EQUAL_SUMS
    return before == EQUAL_SUMS


def processor_name() -> str:
    """The processor as its maker calls it.

    Example:
        >>> bool(processor_name())
        True
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
