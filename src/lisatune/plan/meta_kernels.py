"""Kernels for the meta device that make and keep what those of a real device do."""

from __future__ import annotations

import sys
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations import moe

ATTENTION = "lisatune_plan"
MASKED = "lisatune_plan_masked"  # the same for a model whose own code works on the mask (DeepSeek-V3.2)


def register_attention(device: str) -> None:
    """Register ``attn_implementation=ATTENTION``, which plans the attention of ``cuda`` or ``cpu``."""
    for name in (ATTENTION, MASKED):
        AttentionInterface.register(name, partial(_attention, on_cpu=device == "cpu"))
    AttentionMaskInterface.register(MASKED, _mask)


def _mask(batch_size: int, q_length: int, kv_length: int, *_args: Any, **_kwargs: Any) -> Tensor:
    """A mask as PyTorch's fused attention takes it."""
    return torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device="meta")


@contextmanager
def masks_on_meta() -> Iterator[None]:
    """Inside, rows on the meta device are not looked at for several documents in one: there is nothing to see."""
    packed = masking_utils.find_packed_sequence_indices

    def found(position_ids: Tensor) -> Any:
        return None if position_ids.is_meta else packed(position_ids)

    with patch.object(masking_utils, "find_packed_sequence_indices", found):
        yield


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, *, on_cpu: bool, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What PyTorch's fused attention makes and keeps; on meta it would choose the one that keeps all scores.

    Multi-head latent attention has values of another width than queries. A GPU has a fused kernel for that, a CPU none.
    """
    # sinks, and scores that are capped, which no fused kernel of PyTorch has: the model's own keeps all scores
    if kwargs.get("s_aux") is not None or kwargs.get("softcap") is not None:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        mask = query.new_zeros(query.shape[0], 1, query.shape[2], key.shape[2])
        return eager(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)  # type: ignore[no-any-return]
    query, key = query.to(value.dtype), key.to(value.dtype)  # positions are float32 under autocast
    groups = query.shape[1] // key.shape[1]
    other_width = query.shape[-1] != value.shape[-1]
    if on_cpu and (dropout or other_width):  # then there is no fused one
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling
        )
        return out.transpose(1, 2).contiguous(), None
    if other_width:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, dropout, True, scale=scaling
        )
    else:
        out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout, True, scale=scaling)
    return out[0].transpose(1, 2).contiguous(), None


PRODUCTS: tuple[tuple[Any, str], ...] = (
    (nn.functional, "linear"), (torch, "matmul"), (torch, "bmm"), (torch, "addmm"), (torch, "einsum"), (Tensor, "matmul"),
    (Tensor, "__matmul__"), (Tensor, "bmm"),
)  # fmt: skip


@contextmanager
def mixed_on_meta(*, again: bool = False) -> Iterator[None]:
    """Inside, products of float32 take bfloat16 on the meta device, for which PyTorch has no autocast.

    A weight that trains is cast once in a forward pass, as autocast does it.

    Args:
        again: In a backward pass, where checkpointed layers are computed again: a cast lives as long as it is used.
    """
    known: MutableMapping[int, Tensor] = WeakValueDictionary() if again else {}

    def half(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or not value.is_meta:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(torch.bfloat16)
        cast = known.get(id(value))
        if cast is None:
            cast = known[id(value)] = value.to(torch.bfloat16)
        return cast

    def of_halves(product: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = tree_map(half, (args, kwargs))
            return product(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for owner, name in PRODUCTS:
            stack.enter_context(patch.object(owner, name, of_halves(getattr(owner, name))))
        yield


class _GroupedProduct(torch.autograd.Function):
    """Rows times the matrix of each row's expert: it keeps both factors, and makes the gradients that are asked for."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.shapes = rows.shape, weight.shape
        needs_rows, needs_weight = ctx.needs_input_grad[1], ctx.needs_input_grad[0]
        ctx.save_for_backward(rows if needs_rows else None, weight if needs_weight else None)
        return rows.new_empty(len(rows), weight.shape[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        asked = zip(ctx.shapes, ctx.needs_input_grad, strict=True)
        return tuple(grad.new_empty(shape) if needed else None for shape, needed in asked)


@contextmanager
def experts_on_meta() -> Iterator[None]:
    """Inside, a mixture's experts run on the meta device in any type; PyTorch's own kernel there takes bfloat16 alone."""
    original = getattr(moe, "_grouped_mm", None)
    if original is None:  # another transformers: the forecast says if the model cannot run
        yield
        return

    def product(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        if input.is_meta:
            return _GroupedProduct.apply(input.to(weight.dtype), weight)  # type: ignore[no-any-return,no-untyped-call]
        return original(input, weight, offs)  # type: ignore[no-any-return]

    moe._grouped_mm = product
    try:
        yield
    finally:
        moe._grouped_mm = original
