"""Pages under ``results/``: the date, the commit, the hardware and the versions above each table."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent


def write_page(name: str, table: str, about: str) -> Path:
    """Write ``results/<date>-<name>.md``; paths in the command are cut to their last part."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True
    ).stdout.strip()
    words = [word if word.startswith("-") else Path(word).name for word in sys.argv[1:]]
    date = datetime.date.today().isoformat()
    page = (
        f"# {name}, {date}\n\n{about.strip().splitlines()[0]}\n\n"
        f"Command: `python benchmarks/{Path(sys.argv[0]).name} {shlex.join(words)}`, commit {commit}. "
        f"Hardware: {_hardware()}. Python {platform.python_version()}, "
        + ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers"))
        + f".\n\n{table}\n"
    )
    path = HERE / "results" / f"{date}-{name}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _hardware() -> str:
    import torch

    from lisatune.common.equal_sums import processor_name

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{os.cpu_count()} cores ({processor_name()}), {memory:.0f} GiB{gpu}"
