"""A whole copy of the model on each of several processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lisatune.data.loader import Batch
from lisatune.layers import Layers
from lisatune.memory.bundles import bundles
from lisatune.placement.base import OnDevice, write_files
from lisatune.placement.in_host import InHost
from lisatune.processes.collectives import FAKE, barrier, num_ranks, rank, total

BUCKET_ELEMENTS = 2**23  # gradients summed in one message: 32 MiB


class Copies(OnDevice):
    """Each of several processes holds all weights; the gradients of what trains are summed, and nothing else is sent.

    Cost: a step sends the gradients of what trains, after the last backward pass, and holds one bucket of them.
    Attributes:
        sums_in_float32: Whether gradients are summed in float32; else in their own type.
    """

    can_write_behind = False  # all processes come to a checkpoint together, between two steps
    group: Any = None
    sums_in_float32: bool = True

    def place(self, model: nn.Module, layers: Layers, device: torch.device, dtype: torch.dtype | None = None) -> bool:
        """Put a copy on the device of this process."""
        if device.type == "meta":  # a forecast sends no message, even where there are other processes
            self.group = dist.new_group(backend=FAKE)
        return super().place(model, layers, device, dtype)

    def share(self, batch: Batch) -> Batch:
        """Every so many-th row of ``batch``, as many as on any other process."""
        return batch.share(rank(), num_ranks())

    def total(self, value: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        return total(value)

    def add_up(self, part: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        dist.all_reduce(part, group=self.group)
        return part

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Make every process' gradients their sum; one that a process lacks counts as 0."""
        for bucket in bundles(map(_gradient, (p for p in parameters if p.requires_grad)), BUCKET_ELEMENTS):
            if len(bucket) == 1 and bucket[0].is_contiguous():  # a large one, in pieces
                for piece in torch.split(bucket[0].view(-1), BUCKET_ELEMENTS):
                    self._sum(piece)
                continue
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            self._sum(flat)
            for gradient, part in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def _sum(self, flat: Tensor) -> None:
        """Sum over the processes, in place."""
        if flat.dtype == torch.float32 or not self.sums_in_float32:
            self.add_up(flat)
        else:
            flat.copy_(self.add_up(flat.float()))

    def save_model(self, model: Any, tokenizer: Any, folder: Path, decoder_name: str | None) -> None:
        """The first process writes a Hugging Face folder; the others wait."""
        if rank() == 0:
            super().save_model(model, tokenizer, folder, decoder_name)
        barrier()

    def to_save(self, tensor: Tensor, *, behind: bool) -> Tensor:
        """``tensor`` on the CPU."""
        return tensor.detach().to("cpu").contiguous()

    def write(self, folder: Path, files: Mapping[str, Mapping[str, Tensor]]) -> list[Path]:
        """The first process writes."""
        return write_files(folder, files) if rank() == 0 else []


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


class CopiesInHost(Copies, InHost):
    """``Copies`` whose frozen decoder layers are in host memory, as ``InHost`` has them; each process has its own."""
