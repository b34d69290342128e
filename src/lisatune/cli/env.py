"""`lisatune env`."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from lisatune.cli.common import AsJson, quiet_libraries

# only these variables of the environment are shown, since others may hold passwords
VARIABLES = ("CUDA_VISIBLE_DEVICES", "MKL_CBWR", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
FOR_DEVELOPERS = "dev"


def env(as_json: AsJson = False) -> None:
    """Print versions, processor, GPU and installed extras, for an issue report.

    It names no user, folder or host.

    Example:
        lisatune env
    """
    quiet_libraries()
    found = described()
    print(json.dumps(found) if as_json else "\n".join(lines(found)))


def described() -> dict[str, Any]:
    """This machine and what is installed on it; names no user, folder or host."""
    from lisatune import __version__
    from lisatune.common.equal_sums import processor_name

    return {
        "lisatune": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": f"{processor_name()}, {os.cpu_count()} cores",
        "torch": described_torch(),
        "packages": {name: version_of(name) for name in sorted({need.name for _, need in needs()})},
        "missing_of_extras": missing_of_extras(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def described_torch() -> dict[str, Any]:
    """What PyTorch computes with; if it cannot be imported, why."""
    try:
        import torch
    except (ImportError, OSError) as error:  # a library of CUDA is missing, or fits another version
        return {"error": f"cannot be imported: {error}"}
    from lisatune.common.amounts import gib
    from lisatune.run.determinism import blas

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "CPU": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "BLAS": blas(),
        "CUDA": torch.version.cuda,
        "ROCm": torch.version.hip,
        "GPUs": [f"{gpu.name}, {gib(gpu.total_memory)}, {gpu.major}.{gpu.minor}" for gpu in gpus],
        "MPS": torch.backends.mps.is_available(),
    }


def needs() -> Iterator[tuple[str, Any]]:
    """Each requirement of lisatune with its extra; an empty name where it is always needed."""
    from packaging.requirements import Requirement

    try:
        texts = metadata.requires("lisatune") or []
    except metadata.PackageNotFoundError:  # its source is on the path, but it was not installed
        texts = []
    for need in map(Requirement, texts):
        extra = str(need.marker).partition("extra == ")[2].strip("\"'") if need.marker else ""
        if extra == FOR_DEVELOPERS or (need.marker and not need.marker.evaluate({"extra": extra})):
            continue  # such as what only Windows needs
        yield extra, need


def version_of(package: str) -> str | None:
    """The installed version; None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def missing_of_extras() -> dict[str, list[str]]:
    """What each extra still needs; nothing if it is installed."""
    missing: dict[str, list[str]] = {}
    for extra, need in needs():
        version = version_of(need.name)
        fits = version is not None and need.specifier.contains(version, prereleases=True)
        missing.setdefault(extra or "always needed", []).extend([] if fits else [f"{need.name}{need.specifier}"])
    return dict(sorted(missing.items()))


def lines(found: dict[str, Any]) -> Iterator[str]:
    """``found`` as text that can be pasted into an issue.

    Example:
        >>> list(lines({"python": "3.12", "torch": {"GPUs": [], "MPS": False}}))
        ['python: 3.12', 'torch:', '  GPUs: none', '  MPS: no']
    """
    for name, value in found.items():
        if name == "missing_of_extras":
            told = {
                extra: f"missing {', '.join(missing)}" if missing else "installed" for extra, missing in value.items()
            }
            yield from lines({"extras": told})
        elif isinstance(value, dict):
            yield f"{name}:"
            yield from (f"  {line}" for line in lines(value))
        elif isinstance(value, list):
            yield f"{name}: {'; '.join(value) or 'none'}"
        else:
            yield f"{name}: {'none' if value is None else {True: 'yes', False: 'no'}.get(value, value)}"
