"""What a cut tensor does in the model, with the gradient of its trained blocks alone.

Shapes: N tokens, I inputs, O outputs, V vocabulary, D width, r rows of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lisatune.memory.blocks import Cut, Range


def sliced_linear(input: Tensor, cut: Cut, bias: Tensor | None = None, *, of_inputs: bool = False) -> Tensor:
    """``F.linear(input, weight, bias)``, whose backward pass makes the gradients of the cut's trained blocks alone.

    Of a block of outputs the input is kept, as ever. Of a block of inputs only their share of it is kept.

    Args:
        input: Shape (..., I).
        cut: That of the weight, shape (O, I), or (I, O) if ``of_inputs``.
        bias: Shape (O,).
        of_inputs: The rows of the weight are inputs, as in transformers' ``Conv1D``.
    Returns: Shape (..., O).
    Cost: the product for the inputs' gradient, and the block's share of the one for the weight's.
    """
    cast, weight, bias = _cast(input, cut.whole, bias)
    weight = weight.T if of_inputs else weight
    out: Tensor = _Linear.apply(cast, weight, bias, of_inputs, cut, cut.ranges, *cut.slots)  # type: ignore[no-untyped-call]
    return out


def sliced_embedding(ids: Tensor, cut: Cut, padding_idx: int | None = None) -> Tensor:
    """``F.embedding(ids, weight, padding_idx)``, whose backward pass makes the gradients of the trained blocks alone.

    Sums are made in float32, in the tokens' order, so two runs are equal to the bit.
    """
    out: Tensor = _Embedding.apply(ids, cut.whole, padding_idx, cut, cut.ranges, *cut.slots)  # type: ignore[no-untyped-call]
    return out


def whole_weight(cut: Cut) -> Tensor:
    """The weight itself; its gradient is made whole, and all that does not train is thrown away.

    It is right for whatever is done with the weight, so it is the slow equal of the functions above, and what modules
    get that we do not know.
    """
    out: Tensor = _Whole.apply(cut.whole.detach(), cut, cut.ranges, *cut.slots)  # type: ignore[no-untyped-call]
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
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, of_inputs: bool, cut: Cut,
        ranges: tuple[Range, ...], *slots: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.cuts_inputs, ctx.of_inputs = (cut.dim == 0) == of_inputs, of_inputs
        kept = [input]
        if ctx.cuts_inputs:  # a copy, since a view would keep all of the input
            flat = input.reshape(-1, input.shape[-1])
            kept = [flat[:, start:stop].clone() for start, stop in ranges]
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *kept)
        ctx.cut, ctx.ranges, ctx.dtypes = cut.of_model, ranges, [slot.dtype for slot in slots]
        return nn.functional.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, *kept = ctx.saved_tensors
        needs_input, _, needs_bias = ctx.needs_input_grad[:3]
        flat = grad.reshape(-1, grad.shape[-1])
        if ctx.cuts_inputs:
            pairs = [(flat, part) for part in kept]
        else:
            inputs = kept[0].reshape(-1, kept[0].shape[-1])
            pairs = [(flat[:, start:stop], inputs) for start, stop in ctx.ranges]
        grads = [
            ctx.cut.brought((inputs.T @ outputs if ctx.of_inputs else outputs.T @ inputs).to(dtype), of)
            for (outputs, inputs), dtype, of in zip(pairs, ctx.dtypes, ctx.ranges, strict=True)
        ]
        grad_input = grad @ weight if needs_input else None
        return grad_input, None, flat.sum(0) if needs_bias else None, None, None, None, *grads


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        weight: Tensor,
        padding_idx: int | None,
        cut: Cut,
        ranges: tuple[Range, ...],
        *slots: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding_idx, ctx.cut, ctx.num_rows, ctx.ranges = padding_idx, cut.of_model, len(weight), ranges
        ctx.dtypes = [slot.dtype for slot in slots]
        return nn.functional.embedding(ids, weight, padding_idx)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        ids, flat = ids.reshape(-1), grad.reshape(-1, grad.shape[-1])
        every = 0, ctx.num_rows
        parts = [(of, flat) if ctx.cut.dim == 0 else (every, flat[:, slice(*of)]) for of in ctx.ranges]
        grads = [
            ctx.cut.brought(embedding_rows(ids, grads, rows, ctx.padding_idx).to(dtype), of)
            for (rows, grads), dtype, of in zip(parts, ctx.dtypes, ctx.ranges, strict=True)
        ]
        return None, None, None, None, None, *grads


def embedding_rows(ids: Tensor, grads: Tensor, rows: Range, padding_idx: int | None = None) -> Tensor:
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
    def forward(ctx: Any, weight: Tensor, cut: Cut, ranges: tuple[Range, ...], *slots: Tensor) -> Tensor:
        ctx.cut, ctx.ranges = cut.of_model, ranges
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, None, *(ctx.cut.brought(ctx.cut.part(grad, of).clone(), of) for of in ctx.ranges)
