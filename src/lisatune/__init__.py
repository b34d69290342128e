"""Fine-tune every weight matrix of a language model in the memory that LoRA needs (LISA, arXiv:2403.17919)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lisatune.callback import LisaCallback
    from lisatune.engine import LisaEngine
    from lisatune.errors import UserError
    from lisatune.layers import Layers, find_layers
    from lisatune.loss import linear_cross_entropy
    from lisatune.optim.adamw import AdamW
    from lisatune.plan.forecast import plan_memory
    from lisatune.samplers.base import Sampler
    from lisatune.samplers.sweep import SweepSampler
    from lisatune.samplers.uniform import UniformSampler
    from lisatune.slices.engine import SliceEngine
    from lisatune.trainer.rates import rates_by_part

__version__ = "0.1.0"
__all__ = [
    "AdamW",
    "Layers",
    "LisaCallback",
    "LisaEngine",
    "Sampler",
    "SliceEngine",
    "SweepSampler",
    "UniformSampler",
    "UserError",
    "find_layers",
    "linear_cross_entropy",
    "plan_memory",
    "rates_by_part",
]

_HOME = {
    "AdamW": "optim.adamw",
    "Layers": "layers",
    "LisaCallback": "callback",
    "LisaEngine": "engine",
    "Sampler": "samplers.base",
    "SliceEngine": "slices.engine",
    "SweepSampler": "samplers.sweep",
    "UniformSampler": "samplers.uniform",
    "UserError": "errors",
    "find_layers": "layers",
    "linear_cross_entropy": "loss",
    "plan_memory": "plan.forecast",
    "rates_by_part": "trainer.rates",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: ``lisatune --help`` should not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'lisatune' has no attribute '{name}'")
    return getattr(import_module(f"lisatune.{_HOME[name]}"), name)
