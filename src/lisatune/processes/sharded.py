"""A model as copies or shards on several processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lisatune.layers import Layers
from lisatune.processes.collectives import FAKE, num_ranks


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
