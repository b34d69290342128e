"""Bytes that a run will hold, by part.

Weights, gradients and optimizer state are arithmetic and exact. Activations and temporaries are not counted yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lisatune.engine import LisaEngine
from lisatune.memory.measure import gib


@dataclass(frozen=True)
class Plan:
    """Bytes at the largest set of layers that can be drawn."""

    num_parameters: int
    num_trained: int
    weight_bytes: int
    gradient_bytes: int
    state_bytes: int

    def describe(self) -> str:
        """Two lines for people."""
        share = 100 * self.num_trained / self.num_parameters
        return (
            f"trains {self.num_trained:,} of {self.num_parameters:,} parameters at a time ({share:.1f}%)\n"
            f"weights {gib(self.weight_bytes)} + gradients {gib(self.gradient_bytes)} + optimizer state "
            f"{gib(self.state_bytes)} = {gib(self.weight_bytes + self.gradient_bytes + self.state_bytes)}, "
            "activations and the process itself not counted"
        )


def plan_static(model: nn.Module, engine: LisaEngine | None, moment_bytes: int = 4) -> Plan:
    """Weights, gradients and Adam's two moments of a run.

    Args:
        model: The whole model, adapters included.
        engine: Of LISA, whose largest set of layers is taken; None for what asks for a gradient now.
        moment_bytes: Of one number of optimizer state.
    """
    parameters = list(model.parameters())
    if engine is None:
        trained = [p for p in parameters if p.requires_grad]
    else:
        parts, counts = engine.layers.parts(), engine.layers.num_parameters()
        num_active = len(engine.sampler(0))
        largest = sorted(range(len(engine.layers.decoder)), key=lambda i: -counts[f"layers.{i}"])[:num_active]
        always = {"train_embedding": engine.train_embedding, "train_head": engine.train_head}
        trained = [p for part in engine.layers.trained_parts(tuple(largest), **always) for p in parts[part].values()]
    num_trained = sum(p.numel() for p in trained)
    return Plan(
        num_parameters=sum(p.numel() for p in parameters),
        num_trained=num_trained,
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        gradient_bytes=sum(p.numel() * p.element_size() for p in trained),
        state_bytes=2 * moment_bytes * num_trained,
    )
