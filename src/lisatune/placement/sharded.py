"""A model as copies or shards on several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lisatune.data.loader import Batch
from lisatune.layers import Layers, find_layers
from lisatune.models.load import in_files, is_stored_as_held, save_model_config
from lisatune.placement.base import Hook, OnDevice, convert
from lisatune.processes.collectives import FAKE, barrier, num_ranks, rank, total
from lisatune.processes.shard_files import write_converted_files, write_shards, write_whole_files
from lisatune.processes.tensors import whole


class Sharded(OnDevice):
    """Each of several processes holds a shard of every weight. ``ShardedModel`` is the whole of it.

    Args:
        shard_size: Processes among which each weight is split; the others hold copies of the shards.
        sums_in_float32: Whether gradients are summed in float32; else in their own type.
    """

    in_shards: ClassVar[bool] = True
    can_write_behind = False  # shards are written by all processes together, between two steps
    root: ShardedModel

    def __init__(self, shard_size: int, *, sums_in_float32: bool = True) -> None:
        self.shard_size = shard_size
        self.sums_in_float32 = sums_in_float32

    def place(self, model: nn.Module, layers: Layers, device: torch.device, dtype: torch.dtype | None = None) -> bool:
        """Split the weights. The head is tried before, on the CPU: no device ever sees all of them."""
        self.device = device
        linear_head = layers.head_is_linear()
        self.root = ShardedModel(
            layers, self.shard_size, device, torch.float32 if self.sums_in_float32 else None, dtype=dtype
        )
        return linear_head

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``function(*args, **kwargs)`` with weights at hand. Every process has to come here, with the same shapes of work."""
        return self.root.call(function, *args, **kwargs)

    def share(self, batch: Batch) -> Batch:
        """Every so many-th row of ``batch``, as many as on any other process."""
        return batch.share(rank(), num_ranks())

    def passes(self, micro_batches: Iterable[Batch]) -> Iterator[Batch]:
        """Copies of shards add up their gradients only after the last backward pass, so it is marked."""
        batches = list(micro_batches)
        for micro in batches:
            self.root.set_last(micro is batches[-1])
            yield micro

    def total(self, value: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        return total(value)

    def watch(self, layers: Layers, *, gathering: Hook, computing: Hook, backward: Hook) -> None:
        """FSDP2 gathers weights in hooks of its own, before a layer computes."""
        for layer in layers.decoder:
            layer.register_forward_pre_hook(gathering, prepend=True)
            layer.register_forward_pre_hook(computing)
        self.root.register_forward_hook(backward)  # whose end is no node of autograd's graph

    def adapter(self, model: nn.Module) -> dict[str, Tensor]:
        """LoRA's tensors, whole on the CPU of every process."""
        return {name: whole(p.detach()).cpu() for name, p in model.named_parameters() if "lora_" in name}

    def save_model(self, model: Any, tokenizer: Any, folder: Path, decoder_name: str | None) -> None:
        """Write a Hugging Face folder, though no process holds the whole model."""
        if rank() == 0:
            save_model_config(model, tokenizer, folder)
        barrier()
        parts = find_layers(model, decoder_name).parts()
        files = {part: {n: p.detach() for n, p in every.items()} for part, every in parts.items() if every}
        kept = model.state_dict().keys()
        if buffers := {name: buffer for name, buffer in model.named_buffers() if name in kept}:
            files["buffers"] = buffers
        if is_stored_as_held(model, parts):
            write_whole_files(folder, files)
        else:
            write_converted_files(folder, files, partial(in_files, model))
        if rank() == 0:
            for file in folder.glob("*.safetensors"):
                file.chmod(0o644)

    def to_save(self, tensor: Tensor, *, behind: bool) -> Tensor:
        """The shard itself: it is written before training goes on, a piece at a time."""
        return tensor.detach()

    def write(self, folder: Path, files: Mapping[str, Mapping[str, Tensor]]) -> list[Path]:
        """Each process writes the shards that it holds."""
        return write_shards(folder, files)


class ShardedModel(nn.Module):
    """A model whose weights lie in shards; they are whole while a function is called through this module.

    FSDP2 gathers the weights of a module when its ``forward`` begins. The head's matrix is used by the loss and not by a
    module's ``forward``, so the module that is the root for FSDP2 is this one, and its ``forward`` is whatever is asked for.

    Args:
        layers: The model; it is changed in place. Parameters become other objects, so the optimizer has to be made later.
        shard_size: Processes among which each weight is split; the others hold copies of the shards.
        device: Where the shards go.
        reduce_dtype: Type in which gradients are summed; None for their own.
        dtype: Floating type that weights get before they are split, a layer at a time; None for their own.
    Raises: UserError if the processes cannot be divided like this.
    Cost: while a decoder layer is computed, its weights whole; embedding, norm and head whole from the forward to the end
        of the backward pass.
    """

    def __init__(
        self, layers: Layers, shard_size: int, device: torch.device, reduce_dtype: torch.dtype | None = torch.float32,
        *, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = layers.model
        self.num_copies = num_ranks() // shard_size
        sizes = {"replicate": self.num_copies, "shard": shard_size}
        if self.num_copies == 1:
            del sizes["replicate"]
        # a forecast sends no message, even where there are other processes
        backends: Any = dict.fromkeys(sizes, FAKE) if device.type == "meta" else None
        mesh = init_device_mesh(
            device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes), backend_override=backends
        )
        policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
        for layer in layers.decoder:
            convert(layer.parameters(), dtype)
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        convert(layers.model.parameters(), dtype)
        if not layers.tied:  # a group of its own, so that its float32 gradient is not held beside that of the head
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
        for p in self.parameters():
            p.summed_in = reduce_dtype or p.dtype  # type: ignore[attr-defined]  # for whoever sums gradients itself

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
