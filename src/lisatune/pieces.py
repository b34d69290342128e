"""A model whose decoder layers are drawn in pieces."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from torch import nn

from lisatune.errors import UserError
from lisatune.layers import Layers, Trains

Pieces = Literal["modules", "halves"]


@dataclass(frozen=True)
class ModuleLayers(Layers):
    """``Layers`` whose pool holds pieces of decoder layers in place of whole ones.

    ============ =============================================================================================
    ``modules``  each module with a weight matrix of its own: ``layers.3.self_attn.q_proj``,
                 ``layers.3.mlp.up_proj``, all experts of a layer as far as they are one stacked tensor
    ``halves``   each child of the layer that has matrices in it: ``layers.3.self_attn``, ``layers.3.mlp``
    ============ =============================================================================================

    A piece has the biases and norms that lie inside of it. What lies between the pieces, the two norms of a Llama's
    layer, is part ``layers.3.rest``; it is not in the pool and never trains. So even with every piece active not all of
    the model trains: of Llama-2-7B all but 262,144 weights of 6.7 billion.

    Pieces differ in size (Llama-3.1-8B: k_proj 4 million weights, up_proj 59 million), so the memory of a draw depends
    on what is drawn.

    Reference: Liu et al., MISA, arXiv:2511.00056, which draws modules; Luo et al., BAdam, arXiv:2404.02827, whose
        attention and MLP blocks are the halves.
    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lisatune import find_layers
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        ...                      num_attention_heads=2)
        >>> layers = find_layers(LlamaForCausalLM(config))
        >>> split_layers(layers, "halves").pool()[:3]
        ('layers.0.self_attn', 'layers.0.mlp', 'layers.1.self_attn')
        >>> len(split_layers(layers, "modules").pool())
        21
    """

    pieces: Pieces

    def parts(self) -> dict[str, dict[str, nn.Parameter]]:
        """The same as ``Layers.parts``, but with ``layers.0.self_attn.q_proj``, ..., ``layers.0.rest`` in place of ``layers.0``."""
        parts: dict[str, dict[str, nn.Parameter]] = {}
        for part, parameters in super().parts().items():
            if not part.startswith("layers."):
                parts[part] = parameters
                continue
            layer = self.decoder[int(part.removeprefix("layers."))]
            owner = {
                id(p): f"{part}.{name}"
                for name, piece in self._pieces_of(layer).items()
                for p in piece.parameters()  # a piece inside of a piece comes later, and takes its own
            }
            pieces: dict[str, dict[str, nn.Parameter]] = {}
            for name, parameter in parameters.items():
                pieces.setdefault(owner.get(id(parameter), f"{part}.rest"), {})[name] = parameter
            parts |= pieces
        return parts

    def pool(self, *, train_embedding: Trains = True, train_head: Trains = True) -> tuple[str, ...]:
        """The pieces of all decoder layers, then embedding and head where they are ``sampled``."""
        whole = super().pool(train_embedding=train_embedding, train_head=train_head)[len(self.decoder) :]
        pieces = [part for part in self.parts() if part.startswith("layers.") and not part.endswith(".rest")]
        return (*pieces, *whole)

    def describe(self) -> str:
        """What was found, in one line."""
        num_pieces = len(self.pool())
        return f"{Layers(**_fields(self)).describe()}; {num_pieces} {self.pieces} of decoder layers to draw from"

    def _pieces_of(self, layer: nn.Module) -> dict[str, nn.Module]:
        """Name within the layer to module; without the layer itself."""
        if self.pieces == "halves":
            return {name: m for name, m in layer.named_children() if any(p.ndim >= 2 for p in m.parameters())}
        modules = [(name, m) for name, m in layer.named_modules() if name]
        return {name: m for name, m in modules if any(p.ndim >= 2 for p in m.parameters(recurse=False))}


def split_layers(layers: Layers, pieces: Pieces) -> ModuleLayers:
    """``layers`` with its decoder layers in pieces; costs nothing.

    Raises: UserError for another word than ``modules`` or ``halves``.
    """
    if pieces not in get_args(Pieces):
        raise UserError(f"pieces is '{pieces}': choose one of {', '.join(get_args(Pieces))}")
    return ModuleLayers(**_fields(layers), pieces=pieces)


def _fields(layers: Layers) -> dict[str, Any]:
    return {field.name: getattr(layers, field.name) for field in fields(Layers)}
