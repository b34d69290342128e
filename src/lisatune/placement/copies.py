"""A whole copy of the model on each of several processes, for methods that need whole weights."""

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
from lisatune.processes.collectives import FAKE, barrier, num_ranks, rank, total

BUCKET_ELEMENTS = 2**23  # gradients summed in one message: 32 MiB


class Copies(OnDevice):
    """Each of several processes holds all weights; the gradients of what trains are summed, and nothing else is sent.

    Cost: a step sends the gradients of what trains in float32, after the last backward pass, and holds one bucket of them.
    """

    can_write_behind = False  # all processes come to a checkpoint together, between two steps
    group: Any = None

    def place(self, model: nn.Module, layers: Layers, device: torch.device) -> bool:
        """Put a copy on the device of this process."""
        if device.type == "meta":  # a forecast sends no message, even where there are other processes
            self.group = dist.new_group(backend=FAKE)
        return super().place(model, layers, device)

    def share(self, batch: Batch) -> Batch:
        """Every so many-th row of ``batch``, as many as on any other process."""
        return batch.share(rank(), num_ranks())

    def total(self, value: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        return total(value)

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Make every process' gradients their sum, in float32; one that a process lacks counts as 0."""
        for bucket in bundles((p for p in parameters if p.requires_grad), BUCKET_ELEMENTS):
            for p in bucket:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            flat = torch.cat([p.grad.reshape(-1).float() for p in bucket])  # type: ignore[union-attr]
            dist.all_reduce(flat, group=self.group)
            for p, part in zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True):
                p.grad.copy_(part.view_as(p))  # type: ignore[union-attr]

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
