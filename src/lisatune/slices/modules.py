"""Modules made to use their cut tensors through functions that know of blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lisatune.slices.blocks import Cut, cut_of
from lisatune.slices.functions import sliced_conv1d, sliced_embedding, sliced_linear, whole_weight


class SlicedForward:
    """A module's forward in which only the trained rows of its cut tensors get gradients.

    ``nn.Linear``, ``Conv1D`` and ``nn.Embedding`` have functions of their own. Any other module runs as it is, and sees
    in place of a cut tensor one whose whole gradient is made and thrown away but for the trained rows.

    An object instead of a closure, so that a deep copy of the model calls the modules of the copy.
    """

    def __init__(self, module: nn.Module, slow: bool = False) -> None:
        self.module = module
        self.inner = module.forward
        plain = "forward" not in vars(module) and not slow
        self.kind = next((kind for kind in KNOWN if plain and type(module).forward is kind.forward), None)
        if isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq or module.sparse):
            self.kind = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if not torch.is_grad_enabled():
            return self.inner(*args, **kwargs)
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        cut = cut_of(weight)
        if self.kind is None or kwargs or cut is None or cut_of(bias) is not None:
            return self._shadowed(*args, **kwargs)
        return KNOWN[self.kind](module, args[0], cut, bias)

    def remove(self) -> None:
        """Give the module its own forward back."""
        del vars(self.module)["forward"]
        if self.module.forward != self.inner:
            self.module.forward = self.inner

    def _shadowed(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module while its cut tensors are hidden by others of the same values, whose gradient goes to blocks."""
        cuts = {name: cut_of(p) for name, p in self.module._parameters.items()}
        shadows = {name: whole_weight(cut) for name, cut in cuts.items() if cut is not None}
        vars(self.module).update(shadows)  # found before the parameters of nn.Module are
        try:
            return self.inner(*args, **kwargs)
        finally:
            for name in shadows:
                del vars(self.module)[name]


def _linear(module: Any, input: Tensor, cut: Cut, bias: Tensor | None) -> Tensor:
    return sliced_linear(input, cut, bias)


def _conv1d(module: Any, input: Tensor, cut: Cut, bias: Tensor | None) -> Tensor:
    assert bias is not None
    return sliced_conv1d(input, cut, bias)


def _embedding(module: Any, ids: Tensor, cut: Cut, bias: Tensor | None) -> Tensor:
    return sliced_embedding(ids, cut, module.padding_idx)


KNOWN: dict[Any, Any] = {nn.Linear: _linear, Conv1D: _conv1d, nn.Embedding: _embedding}
