"""The inputs of checkpointed layers in host memory, until the backward pass comes to them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lisatune.layers import Layers
from lisatune.levers.base import Lever
from lisatune.levers.gradient_checkpointing import CheckpointedForward
from lisatune.memory.offload import Shuttle


@dataclass(kw_only=True)
class ActivationOffloading(Lever):
    """Puts ``offload_inputs`` on."""

    def on_model(self, layers: Layers) -> None:
        """``gradient_checkpointing`` was put on before."""
        offload_inputs(layers.decoder)


def offload_inputs(decoder: Sequence[nn.Module]) -> None:
    """Keep the inputs of checkpointed layers in host memory; other layers are left as they are.

    Args:
        decoder: The decoder layers, after ``checkpoint_layers``. A layer must not write to its input (none in transformers
            does).
    Cost: two inputs, B * T * D elements each, are on the device at once (none on a CPU, where it is a plain copy), and each
        is copied twice.
    """
    inputs = HostInputs()
    for layer in decoder:
        if isinstance(layer.forward, CheckpointedForward):
            layer.forward.inputs = inputs


class HostInputs:
    """The inputs of checkpointed layers, in host memory from the forward pass to the backward pass.

    When the backward pass fetches the input of a layer, the copy of the next lower one starts, so that it arrives while
    the layer is computed.
    """

    def __init__(self) -> None:
        self._shuttle: Shuttle | None = None
        self._newest: dict[int, weakref.ref[_HostInput]] = {}

    def __reduce__(self) -> tuple[type[HostInputs], tuple[()]]:
        return HostInputs, ()  # a copy of the model begins with nothing in host memory

    def instead_of(self, hidden: Tensor, index: int) -> AbstractContextManager[None]:
        """While entered, what autograd saves of ``hidden``, the input of layer ``index``, is saved in host memory."""
        if self._shuttle is None or self._shuttle.device != hidden.device:
            self._shuttle = Shuttle(hidden.device)
        shuttle, shape = self._shuttle, hidden.shape  # not ``hidden`` itself: the graph holds these functions

        def pack(tensor: Tensor) -> Tensor | _HostInput:
            # a checkpoint hides what is saved inside of it and saves its own input alone, beside which older torch saves
            # an empty tensor; identity says nothing here, for autograd may hand over another view of the input
            if tensor.shape != shape:
                return tensor
            kept = _HostInput(shuttle.send(tensor), self._newest.get(index - 1))
            self._newest[index] = weakref.ref(kept)
            return kept

        def unpack(kept: Tensor | _HostInput) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            (tensor,) = shuttle.fetch([kept.host])
            below = kept.below() if kept.below is not None else None
            if below is not None:
                shuttle.prefetch([below.host])
            return tensor

        return saved_tensors_hooks(pack, unpack)


class _HostInput:
    """An input in host memory, and the input of the layer below, if that is still waiting for its backward pass."""

    def __init__(self, host: Tensor, below: weakref.ref[_HostInput] | None) -> None:
        self.host = host
        self.below = below
