"""How the processes of a run are started; needs no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def num_started() -> int:
    """Processes that torchrun, or whatever started this one, says there are; 1 if it was started alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def number_started() -> int:
    """The number of this one, from 0."""
    return int(os.environ.get("RANK", "0")) if num_started() > 1 else 0


def command(num_ranks: int, words: Sequence[str]) -> list[str]:
    """torchrun for ``num_ranks`` processes on this host, each of which runs ``lisatune`` with ``words``.

    Example:
        >>> command(2, ["train", "--config", "run.yaml"])[1:]
        ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', '-m', 'lisatune', 'train', '--config', 'run.yaml']
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    return [sys.executable, *torchrun, "-m", "lisatune", *words]


def without_nproc(words: Sequence[str]) -> list[str]:
    """The words of a command line without ``--nproc N`` or ``--nproc=N``.

    Example:
        >>> without_nproc(["train", "--nproc", "2", "--config", "a", "--nproc=2"])
        ['train', '--config', 'a']
    """
    kept = [word for i, word in enumerate(words) if word != "--nproc" and words[i - 1 : i] != ["--nproc"]]
    return [word for word in kept if not word.startswith("--nproc=")]
