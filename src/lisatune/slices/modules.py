"""Modules made to use their cut tensors through functions that know of blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.pytorch_utils import Conv1D

from lisatune.memory.blocks import Cut, cut_in
from lisatune.slices.functions import sliced_embedding, sliced_linear, whole_weight


class ShownWeight(Tensor):
    """A cut tensor as a module's own code sees it: the whole one, whose use as a linear map or an embedding is noticed.

    Then only the trained block gets a gradient. For any other use (a norm's product, stacked experts) the whole gradient is
    made, and thrown away but for the trained block.
    """

    cut_into: Cut

    @classmethod
    def of(cls, cut: Cut) -> Tensor:
        """The weight of ``cut``."""
        if cut.weight.ndim < 2:
            return whole_weight(cut)
        shown = cut.whole.detach().as_subclass(cls)
        shown.cut_into = cut
        return shown

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for whatever is done with such a tensor."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if getattr(function, "__name__", "") == "__get__":  # its shape, type or device
                return function(*args, **kwargs)
            weight = args[1] if len(args) > 1 else None
            if isinstance(weight, cls) and not isinstance(args[0], cls):
                if function is nn.functional.linear and weight.ndim == 2:
                    return sliced_linear(args[0], weight.cut_into, *args[2:], **kwargs)
                if function is nn.functional.embedding and not any(kwargs.get(name) for name in UNUSUAL):
                    return sliced_embedding(args[0], weight.cut_into, kwargs.get("padding_idx"))
            args, kwargs = tree_map_only(cls, lambda shown: whole_weight(shown.cut_into), (args, kwargs))
            return function(*args, **kwargs)


UNUSUAL = ("max_norm", "scale_grad_by_freq", "sparse")  # an embedding with one of these is not cut


class SlicedForward:
    """A module's forward in which only the trained blocks of its cut tensors get gradients.

    ``nn.Linear``, ``Conv1D`` and ``nn.Embedding`` have functions of their own. Any other module runs as it is, and sees
    ``ShownWeight`` in place of a cut tensor.

    An object instead of a closure, so that a deep copy of the model calls the modules of the copy.
    """

    def __init__(self, module: nn.Module, slow: bool = False) -> None:
        self.module = module
        self.show = whole_weight if slow else ShownWeight.of
        self.inner = module.forward
        plain = "forward" not in vars(module) and not slow
        self.kind = next((kind for kind in KNOWN if plain and type(module).forward is kind.forward), None)
        if isinstance(module, nn.Embedding) and any(getattr(module, name) for name in UNUSUAL):
            self.kind = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if not torch.is_grad_enabled():
            return self.inner(*args, **kwargs)
        cut = cut_in(module, "weight")
        if self.kind is None or kwargs or cut is None or cut_in(module, "bias") is not None:
            return self._shadowed(*args, **kwargs)
        return KNOWN[self.kind](module, args[0], cut, module._parameters.get("bias"))

    def remove(self) -> None:
        """Give the module its own forward back."""
        del vars(self.module)["forward"]
        if self.module.forward != self.inner:
            self.module.forward = self.inner

    def _shadowed(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module while its cut tensors are hidden by others of the same values, whose gradient goes to blocks."""
        cuts = {name: cut_in(self.module, name) for name in self.module._parameters}
        shadows = {name: self.show(cut) for name, cut in cuts.items() if cut is not None}
        vars(self.module).update(shadows)  # found before the parameters of nn.Module are
        try:
            return self.inner(*args, **kwargs)
        finally:
            for name in shadows:
                del vars(self.module)[name]


class ReadWhole:
    """Lets whoever reads a cut parameter of ``module``, past its forward, get a whole one whose gradient goes to the blocks.

    TRL multiplies by the head's weight itself. Without this, autograd would find no way from there to the blocks. The whole
    gradient is made then, and thrown away but for the trained blocks.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind = module, type(module)
        names = [name for name, parameter in module._parameters.items() if parameter is not None]
        members = {name: property(partial(_read, name)) for name in names}
        module.__class__ = type(self.kind.__name__, (self.kind,), members)

    def remove(self) -> None:
        """Put the module back as it was."""
        self.module.__class__ = self.kind


def _read(name: str, module: nn.Module) -> Tensor | None:
    cut = cut_in(module, name)
    return whole_weight(cut) if cut is not None and torch.is_grad_enabled() else module._parameters[name]


def _linear(module: Any, input: Tensor, cut: Cut, bias: Tensor | None) -> Tensor:
    return sliced_linear(input, cut, bias)


def _conv1d(module: Any, input: Tensor, cut: Cut, bias: Tensor | None) -> Tensor:
    return sliced_linear(input, cut, bias, of_inputs=True)


def _embedding(module: Any, ids: Tensor, cut: Cut, bias: Tensor | None) -> Tensor:
    return sliced_embedding(ids, cut, module.padding_idx)


KNOWN: dict[Any, Any] = {nn.Linear: _linear, Conv1D: _conv1d, nn.Embedding: _embedding}
