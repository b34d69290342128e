"""The Trainer's processes: whole copies under DistributedDataParallel, shards under FSDP2, and what cannot work."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lisatune.errors import UserError
from lisatune.layers import Layers
from lisatune.memory.bundles import bundles
from lisatune.processes.collectives import num_ranks
from lisatune.trainer.settings import LisaSettings

BUCKET_ELEMENTS = 2**23  # one message: 16 MiB of bfloat16 or 32 MiB of float32, near the 25 MB of DDP's buckets
INSTEAD = "use DistributedDataParallel (examples/accelerate/ddp.yaml)"
TOO_LATE = (
    "on several processes LisaCallback has to be there when the Trainer is made: give it a model (no model_init) and "
    "callbacks=[LisaCallback()], instead of add_callback"
)


def check_processes(state: Any) -> bool:
    """Refuse the ways of joining processes that cannot freeze layers. Returns whether the model will be in shards.

    Args:
        state: The ``AcceleratorState``.
    """
    from accelerate.utils import DistributedType

    kind = state.distributed_type
    if kind == DistributedType.DEEPSPEED:
        raise UserError(
            "DeepSpeed copies all weights into flat tensors when it starts, so no layer can be frozen later: use FSDP2 (examples/accelerate/fsdp2.yaml) or DistributedDataParallel"
        )
    if kind == DistributedType.FSDP and state.fsdp_plugin.fsdp_version != 2:
        raise UserError(
            "FSDP1 joins the parameters of a layer into one flat tensor, which LISA cannot follow: set fsdp_version: 2 "
            "(examples/accelerate/fsdp2.yaml)"
        )
    known = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_HPU", "FSDP")
    if kind.name not in known:
        raise UserError(f"LisaCallback does not work with {kind.name}: use DistributedDataParallel or FSDP2")
    return bool(kind == DistributedType.FSDP)


def check_settings(settings: LisaSettings, *, sharded: bool, finds_unused: bool) -> None:
    """Refuse what works on one process alone, or only where each process holds whole weights.

    Args:
        settings: Of the callback.
        sharded: Whether the weights will be in shards.
        finds_unused: Whether DistributedDataParallel looks for parameters without a gradient.
    """
    if sharded and settings.sampled_unit == "slices":
        raise UserError(f"sampled_unit=slices needs whole weights in each process: {INSTEAD}, or sample layers")
    if sharded and settings.sampler == "gradient_norm":
        raise UserError(f"sampler=gradient_norm needs whole gradients in each process: {INSTEAD}, or another sampler")
    if sharded and settings.state_policy == "keep":
        raise UserError(f"state_policy=keep needs whole optimizer state in each process: {INSTEAD}, or reset_layers")
    if settings.sampled_unit == "slices" and settings.train_norms is not True and not finds_unused:
        raise UserError(
            "slices on several processes need train_norms=True, or no gradient checkpointing and "
            "ddp_find_unused_parameters=True: otherwise DistributedDataParallel waits for a norm"
        )


class Copies:
    """A model that every process holds whole; gradients of what trains are averaged, and of nothing else.

    DistributedDataParallel decides once which parameters it averages, and reserves and sends gradients for all of them.
    So it is told to leave all but one small tensor alone, since it wants one. The others are averaged here, when a
    step's last backward pass has ended. The average is DDP's: the sum over processes divided by their number, in the
    type of the gradient. A gradient that a process lacks counts as 0; one that all lack stays away.

    Args:
        layers: The model, before the Trainer wraps it.
    Attributes:
        by_ddp: Whether DistributedDataParallel averages that tensor.
    Raises: UserError if no small tensor of the model trains in every step.
    Cost: a step sends the bytes of what trains, all at the end of the backward pass, and holds ``BUCKET_ELEMENTS`` of them once more.
    """

    def __init__(self, layers: Layers) -> None:
        self.model = layers.model
        kept = next((name for name, p in layers.parts()["norm"].items() if p.requires_grad), None)
        if kept is None:
            raise UserError(
                f"{type(self.model).__name__} has no norm outside its decoder layers, which DistributedDataParallel would "
                "need: use FSDP2 (examples/accelerate/fsdp2.yaml)"
            )
        self.kept: nn.Parameter = self.model.get_parameter(kept)
        self.by_ddp = True
        names = {name for name, _ in self.model.named_parameters(remove_duplicate=False)} - {kept}
        self.model._ddp_params_and_buffers_to_ignore = sorted(names)  # type: ignore[assignment]

    def begin(self) -> None:
        """Give all processes the weights of the first one, as DDP does for what it looks after."""
        # a model that was evaluated before is prepared for accelerate, which then leaves DistributedDataParallel out
        self.by_ddp = not getattr(self.model, "_is_accelerate_prepared", False)
        if hasattr(self.model, "_ddp_params_and_buffers_to_ignore"):
            del self.model._ddp_params_and_buffers_to_ignore  # or a later training without LISA would average nothing
        with torch.no_grad():
            for parameter in self.model.parameters():
                dist.broadcast(parameter.data, src=0)

    @torch.no_grad()
    def average(self) -> None:
        """Make every process' gradients their average."""
        trained = [p for p in self.model.parameters() if p.requires_grad and not (self.by_ddp and p is self.kept)]
        used = torch.tensor([p.grad is not None for p in trained], dtype=torch.uint8, device=self.kept.device)
        dist.all_reduce(used, dist.ReduceOp.MAX)
        gradients = [_gradient(p) for p, anywhere in zip(trained, used.tolist(), strict=True) if anywhere]
        for bucket in bundles(gradients, BUCKET_ELEMENTS):
            _average(bucket)


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _average(bucket: list[Tensor]) -> None:
    if len(bucket) == 1 and bucket[0].is_contiguous():
        dist.all_reduce(bucket[0].div_(num_ranks()))
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket]).div_(num_ranks())
    dist.all_reduce(flat)
    sizes = [tensor.numel() for tensor in bucket]
    for tensor, part in zip(bucket, torch.split(flat, sizes), strict=True):
        tensor.copy_(part.view_as(tensor))


def prepare_shards(model: nn.Module) -> None:
    """Show FSDP2 every parameter before anything is frozen.

    It learns the types of gradients when a group of parameters is first used, from those that train then (pytorch#186998).
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def trainer_that_resumes() -> Any:
    """The Trainer that is loading its checkpoint further up in this call; None if there is none.

    What is frozen has to be frozen again between the model's weights and the optimizer's state, or PyTorch would look for
    state of all parameters. The Trainer has no event there, so a hook of the model asks who called it.
    """
    from transformers import Trainer

    frame = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if frame.f_code.co_name == "_load_from_checkpoint" and isinstance(owner, Trainer):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None
