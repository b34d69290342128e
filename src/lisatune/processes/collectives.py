"""Training on several processes: who they are, what they agree on, and a model that lies in shards among them.

The engine is PyTorch's: ``torchrun`` starts the processes, FSDP2 (``fully_shard``) holds shards and sums their gradients.
DistributedDataParallel does not fit: it decides once which parameters have gradients. FSDP2 decides anew in each backward
pass, so of frozen layers no gradient is made, copied or sent. Where every process holds a whole copy, ``placement.copies``
sums what has a gradient, and nothing else travels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lisatune.errors import UserError

FAKE = "fake"  # PyTorch's backend whose messages arrive at once and bring nothing


def num_ranks() -> int:
    """Processes that train together; 1 outside ``joined``."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def total(values: Tensor) -> Tensor:
    """Sum over the processes, in place; of a forecast there is nothing to sum."""
    if num_ranks() > 1 and not values.is_meta:
        dist.all_reduce(values)
    return values


def most(*numbers: int) -> list[int]:
    """The largest that any process has of each number: how a signal that only one was sent reaches all."""
    if num_ranks() == 1:
        return list(numbers)
    values = torch.tensor(numbers)  # gloo sends it on the CPU, so nothing waits for a GPU
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return [int(value) for value in values]


def gathered(value: Any) -> list[Any]:
    """What each process has as ``value``, by rank; plain Python objects that PyTorch can send."""
    if num_ranks() == 1:
        return [value]
    values: list[Any] = [None] * num_ranks()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for all processes."""
    if num_ranks() > 1:
        dist.barrier()


@contextmanager
def together() -> Iterator[None]:
    """A user's mistake that one process meets inside stops all of them with its sentence, which rank 0 tells.

    Without this the others would wait for a process that is gone. Inside, processes may wait for each other only in what
    none of them fails alone.

    Raises: UserError on rank 0; SystemExit with status 2 on the others.
    """
    error: UserError | None = None
    try:
        yield
    except UserError as caught:
        error = caught
    if num_ranks() == 1 and error is not None:
        raise error
    sentences = gathered(None if error is None else str(error))
    failed = [number for number, text in enumerate(sentences) if text is not None]
    if failed and rank() == 0:
        where = "" if len(failed) == num_ranks() else f"on rank {_listed(failed)} of {num_ranks()}: "
        raise UserError(where + sentences[failed[0]]) from error
    if failed:
        raise SystemExit(2)


def check_alike(facts: dict[str, Any]) -> None:
    """Refuse to begin where processes were given different things.

    Args:
        facts: What has to be equal everywhere, by the name that people know it by; plain values.
    Raises: UserError that names what differs and on which ranks.
    """
    values = gathered(facts)
    for name, first in values[0].items():
        others = [number for number, theirs in enumerate(values) if theirs[name] != first]
        if others:
            theirs = values[others[0]][name]
            raise UserError(
                f"the processes have different input: {name} is {theirs} on rank {_listed(others)}, but {first} on rank 0; "
                "start them all with the same settings and files"
            )


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
