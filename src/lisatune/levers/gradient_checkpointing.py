"""Activations made anew in the backward pass instead of being kept.

Shapes: B rows, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from lisatune.errors import UserError
from lisatune.layers import Layers
from lisatune.levers.base import Lever

if TYPE_CHECKING:
    from lisatune.levers.activation_offloading import HostInputs


@dataclass(kw_only=True)
class GradientCheckpointing(Lever):
    """Puts ``checkpoint_layers`` on: all decoder layers, or the lowest few. The arguments are settings."""

    gradient_checkpointing: bool | int

    def on_model(self, layers: Layers) -> None:
        """Checkpoints come first: frozen layers in host memory are streamed inside of them."""
        count = None if self.gradient_checkpointing is True else self.gradient_checkpointing
        checkpoint_layers(layers.decoder, count)


def checkpoint_layers(decoder: Sequence[nn.Module], num_layers: int | None = None) -> None:
    """Keep only the inputs of the lowest ``num_layers`` decoder layers; their activations are made again when needed.

    The same as calling each layer through ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False)``: gradients are
    equal to the bit, dropout is repeated, and ``requires_grad`` may change between steps. They equal those of a run without
    a key-value cache (``use_cache=False``, as this package trains). A cache lays keys out in another way, and the bits of a
    product may depend on that. It acts while the layer trains
    and gradients are enabled, and only on layers that are differentiated: below the lowest active layer of a model whose
    embedding is frozen nothing is kept anyway, and nothing is made twice.

    The lowest, because the backward pass comes to them last: what one of them makes again lies beside the inputs of the
    layers below, when the activations of all layers above are gone.

    Args:
        decoder: The decoder layers, the lowest first. A layer takes its input, shape (B, T, D), as its first positional
            argument, as in transformers; the other arguments (masks, rotary embeddings) are shared by all layers and are
            kept as they are. A key-value cache is taken away, because it would be written to twice.
        num_layers: How many to checkpoint, from the lowest; None: all.
    Raises: UserError if there are fewer layers, or one is checkpointed already; and in the forward pass, if the input is
        no positional argument or a key-value cache comes filled.
    Cost: one more forward pass of these layers. Kept are B * T * D elements for each; ``offload_inputs`` moves them away.
    Reference: Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174.
    Example:
        >>> decoder = [nn.Linear(4, 4) for _ in range(3)]
        >>> checkpoint_layers(decoder, 2)
        >>> [is_checkpointed(layer) for layer in decoder]
        [True, True, False]
    """
    count = len(decoder) if num_layers is None else num_layers
    if not 0 <= count <= len(decoder):
        raise UserError(f"num_layers is {num_layers}: choose from 0 to {len(decoder)}, the number of decoder layers")
    for layer in decoder:
        if is_checkpointed(layer):
            raise UserError("the decoder layers are checkpointed already: call checkpoint_layers once")
        if getattr(layer, "gradient_checkpointing", False):
            raise UserError(
                "the model's own gradient checkpointing is on: call model.gradient_checkpointing_disable() first"
            )
    for index, layer in enumerate(decoder[:count]):
        # set on the instance, so that hooks of the module stay outside and run once
        layer.forward = CheckpointedForward(layer, index)  # type: ignore[assignment]


def is_checkpointed(layer: nn.Module) -> bool:
    """Whether ``checkpoint_layers`` acts on this layer."""
    return isinstance(layer.forward, CheckpointedForward)


class CheckpointedForward:
    """A layer's forward that keeps its input only; ``inner`` is what it runs, and runs again in the backward pass.

    An object instead of a closure, so that a deep copy of the model calls the layers of the copy.
    """

    def __init__(self, layer: nn.Module, index: int) -> None:
        self.layer = layer
        self.index = index
        self.inputs: HostInputs | None = None
        self.inner: Callable[..., Any] = layer.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.layer.training and torch.is_grad_enabled()):
            return self.inner(*args, **kwargs)
        args, kwargs = (
            tuple(_without_cache(value) for value in args),
            {name: False if name == "use_cache" else _without_cache(value) for name, value in kwargs.items()},
        )
        if not self._is_differentiated(args, kwargs):
            return self.inner(*args, **kwargs)
        if not args or not isinstance(args[0], Tensor):
            raise UserError(
                f"{type(self.layer).__name__} is not given its input as the first positional argument, so it cannot be "
                "checkpointed: leave checkpoint_layers out"
            )
        hidden, *rest = args

        # a checkpoint saves the tensors it is given; what this function closes over is held, but not saved
        def run(hidden: Tensor) -> Any:
            return self.inner(hidden, *rest, **kwargs)

        keep = nullcontext() if self.inputs is None else self.inputs.instead_of(hidden, self.index)
        with keep:
            return checkpoint(run, hidden, use_reentrant=False)

    def _is_differentiated(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return any(t.requires_grad for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)) or any(
            p.requires_grad for p in self.layer.parameters()
        )


def _without_cache(value: Any) -> Any:
    """None in place of a key-value cache, which the second forward would write to again."""
    if not isinstance(value, Cache):
        return value
    if value.get_seq_length() > 0:
        raise UserError("a filled key-value cache cannot be used with checkpointed layers: call model.eval() first")
    return None
