"""Joining the group of processes that torchrun started."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from lisatune.errors import UserError
from lisatune.processes.collectives import num_ranks
from lisatune.processes.launch import num_started


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that ``torchrun`` has started. Without torchrun, or with one process, do nothing.

    A process that waits for one that is gone gives up after 10 minutes; one may be so much slower in reading the data.
    """
    if num_started() == 1 or dist.is_initialized():
        yield
        return
    store, number, size = next(rendezvous("env://"))
    if size == int(os.environ.get("LOCAL_WORLD_SIZE", "0")):
        # torchrun keeps one store for all its attempts: a process would find the address of one that was killed
        store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=timedelta(minutes=10))
    try:
        yield
    finally:
        # DistributedDataParallel keeps Python's lock while it is freed. If it were the last to hold the group, it would wait for
        # a thread of Gloo that waits for the lock. So it goes first, while others hold the group too
        gc.collect()
        dist.destroy_process_group()
        _let_go()


def _let_go() -> None:
    """Free what still holds the group, so that its threads end.

    PyTorch keeps the layouts of sharded tensors in a cache, and with them the group. A thread of Gloo that still works when
    Python ends may abort the process, after all was saved.
    """
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import debug

        debug._clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
    gc.collect()


def restarted() -> bool:
    """Whether torchrun has started this process in the place of one that died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def local_device(device: torch.device) -> torch.device:
    """``cuda`` as the GPU of this process among those of its host; any other device as it is.

    Raises: UserError if the host has fewer GPUs than processes.
    """
    if num_ranks() == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise UserError(f"device={device} is one GPU for all processes: leave it out, and each takes its own")
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= torch.cuda.device_count():
        raise UserError(
            f"a host has {torch.cuda.device_count()} GPUs, and process {number} would need one more: start fewer with "
            "--nproc-per-node"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)
