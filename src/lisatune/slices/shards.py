"""A cut tensor that lies in shards on several processes, as FSDP2 has it.

Shapes: R rows of a tensor (all its dimensions but the last, as one), P processes, r rows of each shard but the last, W the
width of a block.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lisatune.errors import UserError
from lisatune.memory.blocks import Cut, Range, SliceOf

REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


class ShardedCut(Cut):
    """A ``Cut`` of a parameter of which each process holds some rows: a slot is what it holds of the block.

    The blocks are those of the whole parameter, so a run on other numbers of processes trains the same ones. A block of
    columns is spread evenly. A block of rows lies on the processes that have them, and the others hold nothing of it.
    Every process makes the block's gradient of its own batches. Then they are summed, and each keeps what it holds.

    Args:
        module: The module that has the parameter: FSDP2 puts the whole one there while it computes.
    Raises: UserError if somebody else sums the gradients.
    Cost: what each process sends for a step, in a ring: a block's gradient for columns, two times that for rows.
    """

    def __init__(
        self, name: str, weight: nn.Parameter, num_slices: int, num_active: int, of: SliceOf, module: nn.Module
    ) -> None:
        if not hasattr(weight, "summed_in"):
            raise UserError(
                "slices of weights in shards train by `lisatune train` alone: use DistributedDataParallel here, or layers"
            )
        self._module, self._leaf = module, name.rpartition(".")[2]
        mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
        self._shards, self._num_shards = mesh.get_group("shard"), mesh["shard"].size()
        self._copies = mesh.get_group("replicate") if "replicate" in mesh.mesh_dim_names else None
        first, *middle = weight.shape[: -1 if weight.ndim > 1 else None]
        self._rows_of_shard = math.ceil(first / self._num_shards) * math.prod(middle)  # as FSDP2 cuts
        self._first_row: int = self._rows_of_shard * mesh["shard"].get_local_rank()
        super().__init__(name, weight, num_slices, num_active, of)

    @torch.no_grad()
    def _local(self) -> Tensor:
        """What this process holds, (r, all columns)."""
        local: Tensor = self.weight.to_local()  # type: ignore[attr-defined]
        return local.view(self.shape)

    def _own(self, of: Range) -> Range:
        """Which of the local rows are among rows ``of``."""
        first, last = self._first_row, self._first_row + len(self._local())
        start, stop = (min(max(row, first), last) - first for row in of)
        return start, stop

    def block(self, of: Range) -> Tensor:
        """The rows or columns ``of`` the parameter, as far as they lie on this process: a view."""
        return self.part(self._local(), self._own(of) if self.dim == 0 else of)

    @property
    def whole(self) -> Tensor:
        """The whole parameter, while FSDP2 has gathered it."""
        gathered = self._module._parameters[self._leaf]
        assert gathered is not None
        return gathered

    def brought(self, grad: Tensor, of: Range) -> Tensor:
        """The sum of ``grad`` over all processes, of which each keeps what it holds of the block.

        Args:
            grad: Of rows or columns ``of`` the whole parameter. It is used up.
        """
        dtype, total = grad.dtype, grad.to(self.weight.summed_in)  # type: ignore[attr-defined]
        if self.dim == 0:
            dist.all_reduce(total, group=self._shards)
            start, stop = (row + self._first_row - of[0] for row in self._own(of))
            total = total[start:stop].clone() if start < stop else total[:0]
        else:
            padded = total.new_zeros(self._rows_of_shard * self._num_shards, total.shape[1])
            padded[: len(total)] = total
            total = total.new_empty(self._rows_of_shard, total.shape[1])
            getattr(dist, REDUCE_SCATTER)(total, padded, group=self._shards)
            total = total[: len(self._local())]
        if self._copies is not None:
            dist.all_reduce(total, group=self._copies)
        return total.to(dtype)

    def first_element(self, slot: Tensor) -> int:
        """How many elements of the parameter, as its blocks follow each other, lie before the first one of ``slot``."""
        start, stop = self.range_of(slot)
        if self.dim == 0:
            return (self._first_row + self._own((start, stop))[0]) * self.across()
        return start * self.across() + self._first_row * (stop - start)

    def first_row(self, slot: Tensor) -> int:
        """Which row of its block is the first one that this process holds."""
        if self.dim == 1:
            return self._first_row
        of = self.range_of(slot)
        return self._own(of)[0] + self._first_row - of[0]

    def is_in_place(self) -> bool:
        """Whether the slots still are views of the shard."""
        storage = self._local().untyped_storage()
        return all(slot.untyped_storage().data_ptr() == storage.data_ptr() for slot in self.slots)
