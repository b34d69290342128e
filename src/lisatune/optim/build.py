"""The optimizer of a run, and the clipping of its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lisatune.errors import UserError
from lisatune.layers import Layers
from lisatune.optim.adamw import AdamW
from lisatune.optim.library import make_library_optimizer
from lisatune.optim.moments import StateBits
from lisatune.optim.row_gradients import RowGradients
from lisatune.processes.collectives import num_ranks
from lisatune.processes.tensors import local, over_shards
from lisatune.settings import TrainConfig
from lisatune.settings.optim import OUR_OPTIMS
from lisatune.slices.blocks import whole_of

STATE_BITS: dict[str, StateBits] = {"adamw": 32, "adamw_16bit": 16, "adamw_8bit": 8, "sign": 32}  # sign has none


def make_optimizer(
    config: TrainConfig, groups: list[dict[str, Any]], layers: Layers, *, ours: bool = False
) -> torch.optim.Optimizer:
    """The optimizer of ``config`` over ``groups``, as ``parameter_groups`` makes them.

    Of AdamW PyTorch's own where float32 and nothing asks for ours, as some levers do; ours for the rest.
    """
    parts = layers.parts()
    vocabulary = [*parts["embedding"].values(), *parts["head"].values()]  # which are no hidden matrices
    if config.optim not in OUR_OPTIMS:
        return make_library_optimizer(
            config.optim, groups, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon, momentum=config.momentum, adapt_vectors=config.adapt_vectors, vocabulary=vocabulary,
            seed=config.seed,
        )  # fmt: skip
    trained = groups[0]["params"]
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    ours = ours or config.offload_optimizer or any(group["stateless"] for group in groups)
    if config.optim == "adamw" and not ours and trained[0].dtype == torch.float32:
        return MetaAdamW(groups, **options) if trained[0].is_meta else torch.optim.AdamW(groups, **options, fused=True)
    return AdamW(
        groups, **options, seed=config.seed, state_bits=STATE_BITS[config.optim], offload_state=config.offload_optimizer
    )  # fmt: skip


def parameter_groups(config: TrainConfig, layers: Layers, model: torch.nn.Module) -> list[dict[str, Any]]:
    """Parameters that ask for a gradient, together as far as weight decay, rate and state are alike; matrices first."""
    parts = layers.parts()
    part_of = {p: part for part in ("embedding", "head") for p in parts[part].values()}
    head_ratio = config.embedding_lr_ratio if config.head_lr_ratio is None and layers.tied else config.head_lr_ratio
    if layers.tied and head_ratio != config.embedding_lr_ratio:
        raise UserError("embedding and head are one tensor in this model: leave head_lr_ratio out")
    ratios = {"embedding": config.embedding_lr_ratio, "head": 1.0 if head_ratio is None else head_ratio}
    groups: dict[tuple[bool, bool, float], list[Tensor]] = {}
    trained = [p for p in model.parameters() if p.requires_grad and whole_of(p) is p]
    for p in sorted(trained, key=lambda p: p.ndim < 2):
        ratio = ratios.get(part_of.get(p, ""), 1.0) if p.ndim >= 2 else config.norm_lr_ratio
        stateless = config.optim == "sign" or (hasattr(p, "cut_into") and _forgets(config))
        groups.setdefault((p.ndim < 2, stateless, ratio), []).append(p)
    return [
        {
            "params": own,
            "weight_decay": 0.0 if vector else config.weight_decay,
            "lr_ratio": ratio,
            "stateless": stateless,
        }
        for (vector, stateless, ratio), own in groups.items()
    ]


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
    # in float32, whatever the gradients are: torch's get_total_norm would round the norm to bfloat16
    norms: list[Tensor] = [torch.linalg.vector_norm(local(p.grad), dtype=torch.float32) for p in parameters]
    if row_gradients is not None:
        norms += [row_gradients.sq_norm(p).sqrt() for p in row_gradients.parameters()]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    if num_ranks() > 1:
        norm = over_shards(norm.square(), parameters[0]).sqrt()
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        if row_gradients is not None:
            row_gradients.scale((max_norm / (norm + 1e-6)).clamp(max=1.0))  # as torch does
    return norm


def _forgets(config: TrainConfig) -> bool:
    """Whether no slice trains for longer than a step, so that Adam has nothing to remember of it."""
    changes = config.num_active < config.num_slices and config.sampler != "fixed"
    return config.optim in STATE_BITS and config.interval_steps == 1 and changes and config.state_policy != "keep"
