"""Decoder layers compiled by ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from lisatune.common.compiler import compiling
from lisatune.layers import Layers
from lisatune.levers.base import Lever

MOST_KERNELS = (
    64  # of a layer; torch gives up after 8, and there may be 12 of layers and 24 of halves, see compile_layers
)


@dataclass(kw_only=True)
class TorchCompile(Lever):
    """Puts ``compile_layers`` on. The argument is a setting."""

    torch_compile: bool

    def on_model(self, layers: Layers) -> None:
        """Compile what the method has made of the layers."""
        compile_layers(layers.decoder)


def compile_layers(decoder: Sequence[nn.Module]) -> None:
    """Compile what decoder layers do in a step, once for all layers of a kind, and for all lengths of rows.

    The same as calling each layer through ``torch.compile(forward, dynamic=True, fullgraph=True)``. Weights are arguments of
    the kernel, so layers share it. There is one kernel for a layer that trains and one for a frozen layer, and a third below
    the lowest that trains if the embedding is frozen. Each may be there twice for one row and for several, and twice with and
    without a mask. Halves add two kernels, in which one of them trains. LISA's switches find them all.

    It acts while the layer trains. Evaluations and answers use the layer as it is.

    Raises: UserError in the forward pass, if there is no compiler, or a layer cannot be compiled as a whole.
    Cost: 10 to 20 s of a processor for each kernel in the first run; later runs find it.
    """
    for layer in decoder:
        layer.forward = CompiledForward(layer)  # type: ignore[assignment]


class CompiledForward:
    """A layer's forward that is compiled in steps; ``inner`` is the plain one.

    An object instead of a closure, so that a deep copy of the model calls the layers of the copy.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.inner: Callable[..., Any] = layer.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        weight = next(self.layer.parameters())
        if not self.layer.training or weight.is_meta:
            return self.inner(*args, **kwargs)
        with compiling("torch_compile", weight.device.type):
            return _kernel(type(self.layer))(self.layer, *args, **kwargs)  # type: ignore[arg-type]


@cache
def _kernel(kind: type[nn.Module]) -> Callable[..., Any]:
    import torch
    import torch._dynamo.config

    torch._dynamo.config.recompile_limit = max(MOST_KERNELS, torch._dynamo.config.recompile_limit)
    return torch.compile(kind.forward, dynamic=True, fullgraph=True)
