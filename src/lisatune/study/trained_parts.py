"""What trains in each part of a model: parameters, and LoRA's adapters as peft holds them.

Shapes: LoRA's factors are up, B of the paper, (out, r), and down, A, (r, in).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lisatune.errors import UserError
from lisatune.layers import Layers
from lisatune.study.matrix_rank import product_norm
from lisatune.study.start_weights import blocks_of


@dataclass
class Adapter:
    """LoRA's two factors of one module."""

    name: str
    down_name: str
    down: nn.Parameter
    up_name: str
    up: nn.Parameter
    scale: float
    base: Tensor
    begins_at_zero: bool

    def factors(self) -> dict[str, tuple[str, nn.Parameter]]:
        return {"down": (self.down_name, self.down), "up": (self.up_name, self.up)}


@dataclass
class TrainedPart:
    """What trains in one part of the model.

    Args:
        plain: Parameters that train by themselves.
        adapters: LoRA's adapters.
        base: The weights that a change is compared with, by ``id``.
    """

    plain: dict[str, nn.Parameter]
    adapters: list[Adapter] = field(default_factory=list)
    base: dict[int, Tensor] = field(default_factory=dict)

    def trained(self) -> dict[str, nn.Parameter]:
        return self.plain | dict(item for adapter in self.adapters for item in adapter.factors().values())

    def has_matrices(self) -> bool:
        return bool(self.adapters) or any(p.ndim >= 2 for p in self.plain.values())

    def base_norm(self) -> float:
        norms = []
        for weight in self.base.values():
            blocks = [torch.linalg.vector_norm(weight[i], dtype=torch.float32) for i in blocks_of(weight.shape)]
            norms += torch.stack(blocks).tolist() if blocks else []
        return math.hypot(*norms)

    def num_weights(self) -> int:
        return sum(weight.numel() for weight in self.base.values())


def trained_parts_of(layers: Layers) -> dict[str, TrainedPart]:
    """The parts in which something asks for a gradient."""
    adapters = list(_adapters_of(layers.model))
    in_adapters = {id(parameter) for adapter in adapters for _, parameter in adapter.factors().values()}
    parts = {}
    for name, parameters in layers.parts().items():
        ids = {id(p) for p in parameters.values()}
        plain = {n: p for n, p in parameters.items() if p.requires_grad and id(p) not in in_adapters}
        inside = [adapter for adapter in adapters if id(adapter.down) in ids]
        if plain or inside:
            # a tied head owns no weight, but its adapter changes one
            weights = [p for p in parameters.values() if id(p) not in in_adapters] + [
                adapter.base for adapter in inside
            ]
            parts[name] = TrainedPart(plain, inside, {id(w): w.detach() for w in weights if w.is_floating_point()})
    return parts


def _adapters_of(model: nn.Module) -> Iterator[Adapter]:
    """All LoRA adapters that train, by what peft's modules hold, so that peft need not be installed."""
    for name, module in model.named_modules():
        for kind in ("lora_A", "lora_embedding_A"):
            for adapter in getattr(module, kind, {}):
                found = _adapter_of(module, name, kind, adapter)
                if found.down.requires_grad or found.up.requires_grad:
                    yield found


def _adapter_of(module: Any, name: str, kind: str, adapter: str) -> Adapter:
    kinds = (kind, kind.replace("_A", "_B"))
    holders = [getattr(module, each)[adapter] for each in kinds]
    end = "" if isinstance(holders[0], nn.Parameter) else ".weight"  # an embedding's factors are bare
    down, up = (holder if isinstance(holder, nn.Parameter) else holder.weight for holder in holders)
    base = module.get_base_layer().weight
    # the weights of a Conv1D and of an embedding lie across; quantized ones have no shape to compare
    fits = {tuple(base.shape), tuple(base.shape)[::-1]} & {(up.shape[0], down.shape[1])} or not base.is_floating_point()
    if not fits or len(module.lora_magnitude_vector):
        raise UserError(
            f"norm_steps: the adapter of {name} is not plain LoRA (scale * B * A), so its norm is not known: "
            "leave norm_steps out"
        )
    names = [f"{name}.{each}.{adapter}{end}" for each in kinds]
    return Adapter(name, names[0], down, names[1], up, module.scaling[adapter], base, product_norm(up, down) == 0)
