"""Training on several processes: who they are, what they agree on, and a model that lies in shards among them.

The engine is PyTorch's: ``torchrun`` starts the processes, FSDP2 (``fully_shard``) holds the weights and sums the gradients.
DistributedDataParallel does not fit: it decides once which parameters have gradients. FSDP2 decides anew in each backward
pass, so of frozen layers no gradient is made, copied or sent. A model that every process holds whole is its shard of size
1, where nothing but gradients travels; so replicated, sharded and both at once are one mechanism.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from lisatune.errors import UserError
from lisatune.launch import num_started
from lisatune.layers import Layers

FAKE = "fake"  # PyTorch's backend whose messages arrive at once and bring nothing


def num_ranks() -> int:
    """Processes that train together; 1 outside ``joined``."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def restarted() -> bool:
    """Whether torchrun has started this process in the place of one that died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that ``torchrun`` has started; without it, or if it has started one alone, do nothing.

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
        dist.destroy_process_group()


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


def total(values: Tensor) -> Tensor:
    """Sum over the processes, in place; of a forecast there is nothing to sum."""
    if num_ranks() > 1 and not values.is_meta:
        dist.all_reduce(values)
    return values


def most(*numbers: int) -> list[int]:
    """The largest that any process has of each number: how a signal that only one was sent reaches all."""
    if num_ranks() == 1:
        return list(numbers)
    values = torch.tensor(numbers)  # on the CPU, by gloo: nothing waits for a GPU
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
    told = gathered(None if error is None else str(error))
    failed = [number for number, text in enumerate(told) if text is not None]
    if failed and rank() == 0:
        where = "" if len(failed) == num_ranks() else f"on rank {_listed(failed)} of {num_ranks()}: "
        raise UserError(where + told[failed[0]]) from error
    if failed:
        raise SystemExit(2)


def check_alike(facts: dict[str, Any]) -> None:
    """Refuse to begin where processes were given different things.

    Args:
        facts: What has to be equal everywhere, by the name that people know it by; plain values.
    Raises: UserError that names what differs and on which ranks.
    """
    everyone = gathered(facts)
    for name, first in everyone[0].items():
        others = [number for number, theirs in enumerate(everyone) if theirs[name] != first]
        if others:
            theirs = everyone[others[0]][name]
            raise UserError(
                f"the ranks were not given the same: {name} is {theirs} on rank {_listed(others)}, but {first} on rank 0; "
                "start them all with the same settings and files"
            )


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


class Sharded(nn.Module):
    """A model whose weights lie in shards; they are whole while a function is called through this module.

    FSDP2 gathers the weights of a module when its ``forward`` begins. The head's matrix is used by the loss and not by a
    module's ``forward``, so the module that is the root for FSDP2 is this one, and its ``forward`` is whatever is asked for.

    Args:
        layers: The model; it is changed in place. Parameters become other objects, so the optimizer has to be made later.
        shard_size: Processes among which each weight is split; the others hold copies of the shards.
        device: Where the shards go.
    Raises: UserError if the processes cannot be divided like this.
    Cost: while a decoder layer is computed, its weights whole; embedding, norm and head whole from the forward to the end
        of the backward pass.
    """

    def __init__(self, layers: Layers, shard_size: int, device: torch.device) -> None:
        super().__init__()
        self.model = layers.model
        self.num_copies = num_ranks() // shard_size
        sizes = {"replicate": self.num_copies, "shard": shard_size}
        if self.num_copies == 1:
            del sizes["replicate"]
        # of a forecast no message leaves, even where there are others
        backends: Any = dict.fromkeys(sizes, FAKE) if device.type == "meta" else None
        mesh = init_device_mesh(
            device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes), backend_override=backends
        )
        # sums of gradients in float32, whatever the weights are
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for layer in layers.decoder:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        if not layers.tied:  # by itself, so that its gradient in float32 does not lie beside that of the head
            fully_shard(layers.embedding, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        fully_shard(self, mesh=mesh, mp_policy=policy)
        self.stay_whole: list[Any] = [self] if layers.tied else [layers.embedding, self]
        for module in self.modules():
            if isinstance(module, FSDPModule):  # the loss has its divisor already; gloo knows no sum with a factor
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        # FSDP2 learns the types of gradients at the first call, from what is trainable then: now all is (pytorch#186998)
        with torch.no_grad():
            self.call(lambda: None)

    def forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``function(*args, **kwargs)``."""
        return function(*args, **kwargs)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``function(*args, **kwargs)`` with weights at hand. Every process has to come here, with the same shapes of work."""
        out = self(function, *args, **kwargs)
        if not torch.is_grad_enabled():
            for module in self.stay_whole:
                module.reshard()  # else these would stay whole until a backward pass
        return out

    def set_last(self, last: bool) -> None:
        """Whether the next backward pass is the step's last: copies add up their gradients only then."""
        self.set_requires_all_reduce(last)  # type: ignore[operator]


def local(tensor: Tensor) -> Tensor:
    """What this process holds of ``tensor``: a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def over_shards(value: Tensor, parameter: Tensor) -> Tensor:
    """Sum of ``value`` over the processes that hold the shards of ``parameter``, in place."""
    if isinstance(parameter, DTensor):
        dist.all_reduce(value, group=parameter.device_mesh.get_group("shard"))
    return value


def as_shard(value: Tensor, parameter: Tensor) -> Tensor:
    """``value``, of which each process holds what it holds of ``parameter``, as one tensor in shards."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor) or value.shape != local(parameter).shape:
        return value
    return DTensor.from_local(
        value, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride(),
        run_check=False,
    )  # fmt: skip


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``, on every process; each has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def first_element(tensor: Tensor) -> int:
    """Where in the flat ``tensor`` the part that this process holds begins; of a slice, where it begins in the whole."""
    if cut := getattr(tensor, "cut", None):
        return int(cut.first_element(tensor))
    if not isinstance(tensor, DTensor):
        return 0
    shards = tensor.device_mesh["shard"]
    rows = -(-len(tensor) // shards.size())  # of each shard but the last, as torch.chunk cuts
    return min(rows * shards.get_local_rank(), len(tensor)) * (tensor.numel() // len(tensor))
