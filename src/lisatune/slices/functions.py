"""What a cut tensor does in the model, with the gradient of its trained rows alone.

Shapes: N tokens, I inputs, O outputs, V vocabulary, D width, r rows of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lisatune.memory.blocks import Cut, Rows


def sliced_linear(input: Tensor, cut: Cut, bias: Tensor | None = None) -> Tensor:
    """``F.linear(input, weight, bias)``, whose backward pass makes the gradients of the cut's trained rows, (r, I) each.

    Cost: the product for the inputs' gradient, and r / O of the one for the weight's. The input is kept, as ever.
    """
    out: Tensor = _Linear.apply(*_cast(input, cut.weight, bias), cut.rows, *cut.slots)  # type: ignore[no-untyped-call]
    return out


def sliced_conv1d(input: Tensor, cut: Cut, bias: Tensor) -> Tensor:
    """``input @ weight + bias`` for transformers' ``Conv1D``, whose weight is (I, O): its rows are inputs.

    Only the trained rows' share of the input is kept for the backward pass.
    """
    out: Tensor = _Conv1D.apply(*_cast(input, cut.weight, bias), cut.rows, *cut.slots)  # type: ignore[no-untyped-call]
    return out


def sliced_embedding(ids: Tensor, cut: Cut, padding_idx: int | None = None) -> Tensor:
    """``F.embedding(ids, weight, padding_idx)``, whose backward pass makes the gradients of the trained rows, (r, D) each.

    Sums are made in float32, in the tokens' order, so two runs are equal to the bit.
    """
    out: Tensor = _Embedding.apply(ids, cut.weight, padding_idx, cut.rows, *cut.slots)  # type: ignore[no-untyped-call]
    return out


def whole_weight(cut: Cut) -> Tensor:
    """The weight itself; its gradient is made whole, and all rows that do not train are thrown away.

    It is right for whatever is done with the weight, so it is the slow equal of the functions above, and what modules
    get that we do not know.
    """
    out: Tensor = _Whole.apply(cut.weight.detach(), cut.rows, *cut.slots)  # type: ignore[no-untyped-call]
    return out


def _cast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """All three in autocast's type, if it is on; the weight is frozen, so no graph is made of it."""
    kind = input.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, rows: tuple[Rows, ...], *slots: Tensor
    ) -> Tensor:
        ctx.save_for_backward(input, weight if ctx.needs_input_grad[0] else None)
        ctx.rows, ctx.dtypes = rows, [slot.dtype for slot in slots]
        return nn.functional.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        input, weight = ctx.saved_tensors
        needs_input, _, needs_bias = ctx.needs_input_grad[:3]
        flat, inputs = grad.reshape(-1, grad.shape[-1]), input.reshape(-1, input.shape[-1])
        grads = [
            (flat[:, start:stop].T @ inputs).to(dtype)
            for (start, stop), dtype in zip(ctx.rows, ctx.dtypes, strict=True)
        ]
        return grad @ weight if needs_input else None, None, flat.sum(0) if needs_bias else None, None, *grads


class _Conv1D(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, rows: tuple[Rows, ...], *slots: Tensor
    ) -> Tensor:
        inputs = input.reshape(-1, input.shape[-1])
        parts = [inputs[:, start:stop].clone() for start, stop in rows]  # a view would keep all of the input
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *parts)
        ctx.dtypes = [slot.dtype for slot in slots]
        return torch.addmm(bias, inputs, weight).view(*input.shape[:-1], weight.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, *parts = ctx.saved_tensors
        needs_input, _, needs_bias = ctx.needs_input_grad[:3]
        flat = grad.reshape(-1, grad.shape[-1])
        grads = [(part.T @ flat).to(dtype) for part, dtype in zip(parts, ctx.dtypes, strict=True)]
        grad_input = (flat @ weight.T).view(*grad.shape[:-1], weight.shape[0]) if needs_input else None
        return grad_input, None, flat.sum(0) if needs_bias else None, None, *grads


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, padding_idx: int | None, rows: tuple[Rows, ...], *slots: Tensor
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding_idx, ctx.rows, ctx.dtypes = padding_idx, rows, [slot.dtype for slot in slots]
        return nn.functional.embedding(ids, weight, padding_idx)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        ids, flat = ids.reshape(-1), grad.reshape(-1, grad.shape[-1])
        grads = [
            embedding_rows(ids, flat, rows, ctx.padding_idx).to(dtype)
            for rows, dtype in zip(ctx.rows, ctx.dtypes, strict=True)
        ]
        return None, None, None, None, *grads


def embedding_rows(ids: Tensor, grads: Tensor, rows: Rows, padding_idx: int | None = None) -> Tensor:
    """The gradient of rows ``rows`` of an embedding: each token adds its output's gradient to its row; float32, (r, D).

    To choose the tokens of these rows would make the CPU wait for a GPU to count them. So the others take part too, and
    add zeros to rows of their own remainder: they are spread, because sums into one row run one after the other.
    """
    start, stop = rows
    total = grads.new_zeros((stop - start, grads.shape[1]), dtype=torch.float32)
    if start == stop:
        return total
    inside = (ids >= start) & (ids < stop)
    if padding_idx is not None:
        inside &= ids != padding_idx
    into = (ids - start).remainder_(stop - start)
    values = torch.where(inside[:, None], grads, 0).float()
    if grads.device.type == "cuda":  # index_add_ sums in any order there, and two runs would differ
        return total.index_put_((into,), values, accumulate=True)
    return total.index_add_(0, into, values)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: tuple[Rows, ...], *slots: Tensor) -> Tensor:
        ctx.rows, ctx.shape = rows, (-1, weight.shape[-1]) if weight.ndim > 1 else (-1,)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = [grad.reshape(ctx.shape)[start:stop].clone() for start, stop in ctx.rows]
        return None, None, *grads
