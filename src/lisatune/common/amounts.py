"""Amounts of memory, written and read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lisatune.errors import UserError

GIB = 2**30


def gib(num_bytes: float) -> str:
    """Bytes for people: GiB, or MiB where GiB would say little.

    Example:
        >>> gib(3 * 2**29), gib(2**20)
        ('1.50 GiB', '1.0 MiB')
    """
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"


def peak_of(summary: Mapping[str, Any]) -> str:
    """The peak memory of a run, by its ``summary.json``, beside the forecast.

    A forecast is of tensors. On a GPU these are what is measured. On a CPU the process holds more: Python, its libraries,
    and what the system's allocator keeps.

    Example:
        >>> peak_of({"peak_bytes": 2**31, "base_bytes": 0, "planned_peak_bytes": 2**31})
        '2.00 GiB (predicted: 2.00 GiB)'
        >>> peak_of({"peak_bytes": 5 * 2**29, "base_bytes": 2**29, "planned_peak_bytes": 2**31, "tensor_peak_bytes": 2**31})
        '2.00 GiB of tensors (predicted: 2.00 GiB); the process held 2.50 GiB, 0.50 GiB of it before training'
    """
    base = summary.get("base_bytes", 0)  # runs of earlier versions have neither this nor a forecast
    peak, planned = gib(summary["peak_bytes"]), summary.get("planned_peak_bytes")
    if not base:
        return peak + (f" (predicted: {gib(planned)})" if planned else "")
    process = f"the process held {peak}, {gib(base)} of it before training"
    if tensors := summary.get("tensor_peak_bytes"):
        return f"{gib(tensors)} of tensors" + (f" (predicted: {gib(planned)})" if planned else "") + f"; {process}"
    return process + (f"; predicted for tensors alone: {gib(planned)}" if planned else "")


def parse_bytes(text: str) -> int:
    """``24GiB``, ``24G`` or ``24`` as bytes; GB are 10**9.

    Raises: UserError for anything else.
    Example:
        >>> parse_bytes("24GiB") == 24 * 2**30, parse_bytes("80 GB"), parse_bytes("1.5") == 1.5 * 2**30
        (True, 80000000000, True)
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)(b?)\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise UserError(f"'{text}' is not an amount of memory: write it as 24GiB or 24GB")
    number, prefix, binary, byte = match.groups()
    decimal = byte and not binary and prefix
    power = "kmgt".index((prefix or "g").lower()) + 1
    return int(float(number) * (1000 if decimal else 1024) ** power)
