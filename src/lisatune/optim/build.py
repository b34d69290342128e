"""The optimizer of a run, and the clipping of its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lisatune.errors import UserError
from lisatune.layers import Layers
from lisatune.memory.blocks import whole_of
from lisatune.optim.adamw import AdamW
from lisatune.optim.moments import StateBits
from lisatune.optim.row_gradients import RowGradients
from lisatune.processes.tensors import is_sharded, local, norm_over_shards


def make_adamw(
    groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, seed: int = 0,
    state_bits: StateBits = 32, offload_optimizer: bool = False, ours: bool = False, optim_compile: bool = False,
) -> torch.optim.Optimizer:  # fmt: skip
    """PyTorch's AdamW in float32 if nothing asks for ours, as some levers do; ours for the rest."""
    options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps}
    trained = groups[0]["params"]
    ours = (
        ours
        or offload_optimizer
        or state_bits != 32
        or any(group["stateless"] or group.get("factored") for group in groups)
    )
    in_float32 = trained[0].dtype == torch.float32
    matrices = [group for group in groups if group["params"][0].ndim > 1]
    if optim_compile and in_float32 and (not ours or all(group["stateless"] for group in matrices)):
        raise UserError(
            "optim_compile=true has no effect with float32 weights and these settings, which PyTorch updates in few kernels: leave it out"
        )
    if not ours and in_float32:
        return MetaAdamW(groups, **options) if trained[0].is_meta else torch.optim.AdamW(groups, **options, fused=True)
    return AdamW(
        groups, **options, seed=seed, state_bits=state_bits, offload_state=offload_optimizer, compiled=optim_compile
    )


def parameter_groups(
    layers: Layers,
    model: torch.nn.Module,
    *,
    weight_decay: float = 0.0,
    embedding_lr_ratio: float = 1.0,
    head_lr_ratio: float | None = None,
    norm_lr_ratio: float = 1.0,
    stateless: bool = False,
    factored: bool = False,
    stateless_slices: bool = False,
    spectral: bool = False,
) -> list[dict[str, Any]]:
    """Parameters that ask for a gradient, together as far as weight decay, rate and state are alike; matrices first.

    Args:
        layers: The parts of the model.
        model: The model, perhaps wrapped.
        weight_decay: Decay of matrices; vectors have none.
        embedding_lr_ratio: Learning rate of the embedding, as a multiple of the optimizer's.
        head_lr_ratio: The same for the head; None for 1, or for that of the embedding if the two are tied.
        norm_lr_ratio: The same for vectors.
        stateless: Keep no state of any parameter.
        factored: Keep a factored second moment alone.
        stateless_slices: Keep no state of what is cut into slices.
        spectral: Take the spectral step of hidden matrices: not of embedding, head, and tensors of three dimensions.
    """
    parts = layers.parts()
    part_of = {p: part for part in ("embedding", "head") for p in parts[part].values()}
    head_ratio = embedding_lr_ratio if head_lr_ratio is None and layers.tied else head_lr_ratio
    if layers.tied and head_ratio != embedding_lr_ratio:
        raise UserError("embedding and head are one tensor in this model: leave head_lr_ratio out")
    ratios = {"embedding": embedding_lr_ratio, "head": 1.0 if head_ratio is None else head_ratio}
    groups: dict[tuple[bool, bool, bool, float], list[Tensor]] = {}
    trained = [p for p in model.parameters() if p.requires_grad and whole_of(p) is p]
    for p in sorted(trained, key=lambda p: p.ndim < 2):
        ratio = ratios.get(part_of.get(p, ""), 1.0) if p.ndim >= 2 else norm_lr_ratio
        forgets = stateless or (stateless_slices and hasattr(p, "cut_into"))
        of_matrix = spectral and p.ndim == 2 and p not in part_of
        groups.setdefault((p.ndim < 2, forgets, of_matrix, ratio), []).append(p)
    return [
        {"params": members, "weight_decay": 0.0 if vector else weight_decay, "lr_ratio": ratio, "stateless": forgets,
         "factored": factored, "spectral": of_matrix}
        for (vector, forgets, of_matrix, ratio), members in groups.items()
    ]  # fmt: skip


class MetaAdamW(torch.optim.AdamW):
    """What PyTorch's fused AdamW holds, for a forecast: two moments and no temporaries; it does not run on meta."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the moments of whatever has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def clip_gradients(
    optimizer: torch.optim.Optimizer, max_norm: float, row_gradients: RowGradients | None = None
) -> Tensor:
    """Scale all gradients down to the global norm ``max_norm`` (0: leave them); returns the norm before, a scalar."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # the norm is float32 for any gradients: torch's get_total_norm would round it to bfloat16
    norms: list[Tensor] = [torch.linalg.vector_norm(local(p.grad), dtype=torch.float32) for p in parameters]
    if row_gradients is not None:
        norms += [row_gradients.sq_norm(p).sqrt() for p in row_gradients.parameters()]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    if parameters:
        norm = norm_over_shards(norm, parameters[0])
    if max_norm:
        for alike in (True, False):  # torch takes no slices and shards together
            torch.nn.utils.clip_grads_with_norm_([p for p in parameters if is_sharded(p) is alike], max_norm, norm)
        if row_gradients is not None:
            row_gradients.scale((max_norm / (norm + 1e-6)).clamp(max=1.0))  # torch does the same
    return norm
