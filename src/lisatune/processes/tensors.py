"""Tensors of which a process holds a shard."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds some of ``tensor`` only."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of ``tensor``: a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def over_shards(value: Tensor, parameter: Tensor) -> Tensor:
    """Sum of ``value`` over the processes that hold the shards of ``parameter``, in place."""
    sharded = _sharded(parameter)
    if sharded is not None:
        dist.all_reduce(value, group=sharded.device_mesh.get_group("shard"))
    return value


def norm_over_shards(norm: Tensor, parameter: Tensor) -> Tensor:
    """The norm of gradients in shards as ``parameter`` is, of which each process has the ``norm`` of its own."""
    if _sharded(parameter) is None:
        return norm
    return over_shards(norm.square(), parameter).sqrt()


def as_shard(value: Tensor, parameter: Tensor) -> Tensor:
    """``value``, of which each process holds what it holds of ``parameter``, as one tensor in shards."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor) or value.shape != local(parameter).shape:
        return value
    return DTensor.from_local(
        value, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride(),
        run_check=False,
    )  # fmt: skip


def _sharded(parameter: Tensor) -> DTensor | None:
    """The parameter in shards that ``parameter`` is, or is a slice of."""
    cut = getattr(parameter, "cut", None)
    whole = parameter if cut is None else cut.weight
    return whole if isinstance(whole, DTensor) else None


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
    rows = -(-len(tensor) // shards.size())  # rows of each shard but the last, as torch.chunk cuts
    return min(rows * shards.get_local_rank(), len(tensor)) * (tensor.numel() // len(tensor))
