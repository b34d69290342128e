"""What the benchmarks share: pages under ``results/``, tables, where shapes and data are, and commands of lisatune."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
SHAPES = HERE / "shapes"
SHARED = HERE.parents[1] / "shared"  # models and data next to the checkout; benchmarks/README.md says which


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


def lisatune(*words: object) -> str:
    """Run a command of lisatune on one core; what it prints."""
    command = [sys.executable, "-m", "lisatune", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def processor_seconds() -> float:
    """Processor time of this process, and of children that have ended, such as a compiler."""
    return sum(os.times()[:4])


def commit() -> str:
    """The commit that is checked out, short."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, cwd=HERE, capture_output=True, text=True).stdout.strip()


def write_page(name: str, table: str, about: str) -> Path:
    """Write ``results/<date>-<name>.md``; paths in the command are cut to their last part."""
    words = [word if word.startswith("-") else Path(word).name for word in sys.argv[1:]]
    date = datetime.date.today().isoformat()
    page = (
        f"# {name}, {date}\n\n{about.strip().splitlines()[0]}\n\n"
        f"Command: `python benchmarks/{Path(sys.argv[0]).name} {shlex.join(words)}`, commit {commit()}. "
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
