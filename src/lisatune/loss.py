"""The loss over a large vocabulary, without the logits of all tokens.

Shapes: N tokens, D width, V vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lisatune.data.loader import Batch
from lisatune.data.tokenize import IGNORED
from lisatune.errors import UserError
from lisatune.layers import Layers
from lisatune.memory.blocks import Cut, Range, cut_in
from lisatune.optim.row_gradients import HeadPart, RowGradients
from lisatune.slices.functions import whole_weight

# the most logits and tokens at once by default: 64 MiB in float32 for a vocabulary of 32k, 128 MiB for one of 128k; the
# products of fewer tokens would read the head's weight too often
CHUNK_LOGITS, CHUNK_TOKENS = 2**25, 512


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    num_labelled: int | None = None,
    chunk_tokens: int | None = None,
    row_gradients: RowGradients | None = None,
    cut: Cut | None = None,
    weights: Tensor | None = None,
    labelled: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of ``hidden @ weight.T + bias`` against ``labels``, a few tokens at a time.

    Same value as ``F.cross_entropy((hidden @ weight.T + bias).float(), labels)``, but only labelled tokens are
    multiplied by the head at all, and the logits of only ``chunk_tokens`` of them exist at once, forward and backward:
    N * V * 4 bytes become chunk_tokens * V * 4. The gradients are made in the forward pass, where the logits are, so
    nothing is computed twice; those of a frozen ``weight`` are not made. On the meta device, where labels have no values,
    all tokens count as labelled.

    Args:
        hidden: Last hidden states, shape (N, D), any floating dtype.
        weight: Output embedding, shape (V, D), dtype of ``hidden``.
        labels: Next-token ids, already shifted, shape (N,), int64; -100 means no target.
        bias: Bias of the head, shape (V,), if it has one.
        num_labelled: Divisor of the summed loss; the whole step's count when accumulating. Default: this call's.
        chunk_tokens: Changes memory and speed, never the loss but for rounding. Default: ``CHUNK_TOKENS``, or what makes
            ``CHUNK_LOGITS``.
        row_gradients: If given, ``weight`` gets no gradient of its shape; instead the backward pass leaves there what
            its rows' gradients are made from, a block at a time. Holds the labelled tokens' hidden states until then.
        cut: If given, that of ``weight``: only its trained blocks get a gradient, of their own shape.
        weights: What each token's loss is multiplied by, shape (N,), float32. Default: 1 each.
        labelled: Places of the labels that are not -100, ascending, int64. If it is given, nobody waits for a GPU to count them.
    Returns: Scalar float32; 0.0 with zero gradients when nothing is labelled.
    Raises: ValueError if ``hidden`` and ``labels`` differ in N; UserError for row gradients of a weight that is computed
        from others.
    Reference: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, arXiv:2411.09009.
    Example:
        >>> h, w, y = torch.randn(6, 4), torch.randn(10, 4), torch.tensor([1, 2, -100, 3, 4, 5])
        >>> torch.allclose(linear_cross_entropy(h, w, y, chunk_tokens=4),
        ...                torch.nn.functional.cross_entropy(h @ w.T, y))
        True
    """
    if hidden.shape[:1] != labels.shape:
        raise ValueError(
            f"hidden has {hidden.shape[0]} tokens, but labels have shape {tuple(labels.shape)}: give one label for each token"
        )
    if row_gradients is not None and not weight.is_leaf:
        raise UserError(
            "the head's weight is computed from other tensors, so its gradient cannot be made in blocks: leave vocabulary_blocks out, or do not give row_gradients"
        )
    if labels.is_meta:
        labelled = torch.arange(len(labels), device=labels.device)
    elif labelled is None:
        labelled = (labels != IGNORED).nonzero().squeeze(1)
    chunk_tokens = chunk_tokens or max(1, min(CHUNK_TOKENS, CHUNK_LOGITS // len(weight)))
    divisor = max(1, len(labelled) if num_labelled is None else num_labelled)
    if not torch.is_grad_enabled():  # else gradients would be made here that nobody asks for
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
        cut = None
    ranges, slots = ((), ()) if cut is None else (cut.ranges, tuple(cut.slots))
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden.index_select(0, labelled), weight, bias, labels[labelled], divisor, chunk_tokens, row_gradients,
        None if weights is None else weights[labelled, None], cut, ranges, *slots,
    )  # fmt: skip
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        divisor: int,
        chunk_tokens: int,
        row_gradients: RowGradients | None,
        weights: Tensor | None,
        cut: Cut | None,
        ranges: tuple[Range, ...],
        *slots: Tensor,
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        leaves_part = wants_weight and row_gradients is not None
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight and not leaves_part else None
        grad_slots = (
            [torch.zeros_like(cut.part(weight, of), memory_format=torch.contiguous_format) for of in ranges]
            if cut is not None and any(ctx.needs_input_grad[10:])
            else []
        )
        grad_bias = torch.zeros_like(bias) if bias is not None and wants_bias else None
        log_normalisers = hidden.new_empty(len(hidden), dtype=torch.float32) if leaves_part else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits_CV = torch.nn.functional.linear(hidden[rows], weight, bias).float()
            target = labels[rows, None]
            target_logits = logits_CV.gather(1, target)
            # computed in place, since logsumexp would make a second tensor of this size
            largest = logits_CV.amax(1, keepdim=True)
            softmax = logits_CV.sub_(largest).exp_()
            total = softmax.sum(1, keepdim=True)
            log_normaliser = total.log() + largest
            losses = log_normaliser - target_logits
            loss += (losses if weights is None else losses * weights[rows]).sum()
            if log_normalisers is not None:
                log_normalisers[rows] = log_normaliser[:, 0]
            if grad_hidden is None and grad_weight is None and grad_bias is None and not grad_slots:
                del logits_CV, softmax
                continue
            # d loss / d logits = (softmax - one-hot) / divisor
            grad = softmax.div_(total)
            grad.scatter_add_(1, target, torch.full_like(target, -1, dtype=grad.dtype))
            grad = grad.div_(divisor) if weights is None else grad.mul_(weights[rows]).div_(divisor)
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, hidden[rows])
            for (first, last), grad_slot in zip(ranges, grad_slots, strict=False):
                if cut is None or cut.dim == 0:
                    grad_slot.addmm_(grad[:, first:last].T, hidden[rows])
                else:
                    grad_slot.addmm_(grad.T, hidden[rows, first:last])
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            del logits_CV, softmax, grad  # else the next chunk's logits are made beside them
        kept: tuple[Tensor | None, ...] = ()
        if leaves_part:  # a copy of the bias, which may be updated before the weight's blocks are made
            kept = (hidden, labels, log_normalisers, None if bias is None else bias.clone())
        ctx.weight, ctx.divisor, ctx.row_gradients, ctx.weights = weight, divisor, row_gradients, weights
        ctx.cut, ctx.ranges, ctx.num_slots, ctx.num_grads = (
            cut and cut.of_model,
            ranges,
            len(slots),
            3 + len(grad_slots),
        )
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, *grad_slots, *kept)
        return loss / divisor

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        grads, kept = ctx.saved_tensors[: ctx.num_grads], ctx.saved_tensors[ctx.num_grads :]
        if kept:
            hidden, labels, log_normaliser, bias = kept
            factor = scale.float() / ctx.divisor
            factor = factor.expand(len(labels), 1) if ctx.weights is None else factor * ctx.weights
            part = HeadPart(hidden.detach(), labels, log_normaliser, bias, factor)
            ctx.row_gradients.add(ctx.weight, part)
        grads = [None if grad is None else grad.mul_(scale.to(grad.dtype)) for grad in grads]
        grad_slots = [ctx.cut.brought(grad, of) for grad, of in zip(grads[3:], ctx.ranges, strict=False)]
        return (*grads[:3], None, None, None, None, None, None, None, *(grad_slots or [None] * ctx.num_slots))


def batch_loss(
    layers: Layers, batch: Batch, num_labelled: int, *, linear_head: bool, row_gradients: RowGradients | None = None
) -> Tensor:
    """Summed next-token cross-entropy of ``batch`` divided by ``num_labelled``; scalar float32.

    Args:
        layers: The model.
        batch: Rows on the model's device.
        num_labelled: Labelled tokens of the whole optimizer step, so that micro-batches add up to one mean.
        linear_head: ``layers.head_is_linear()``: then logits exist for a few labelled tokens at a time only.
        row_gradients: Where the head's gradient is left, if it is to be made a block at a time.
    """
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids + layers.first_position}
    weights = None if batch.weights is None else batch.weights.flatten()
    if linear_head:
        assert isinstance(layers.head, nn.Linear)
        hidden, routers = trunk_and_routers(layers, inputs)
        hidden = hidden.flatten(0, 1)
        weight, bias = layers.head.weight, layers.head.bias
        bias_cut = cut_in(layers.head, "bias")
        loss = linear_cross_entropy(
            hidden, weight, batch.labels.flatten(), bias=whole_weight(bias_cut) if bias_cut else bias,
            num_labelled=num_labelled, row_gradients=row_gradients, cut=cut_in(layers.head, "weight"), weights=weights,
            labelled=batch.labelled,
        )  # fmt: skip
        return loss + router_loss(layers, batch, num_labelled, routers) if routers else loss
    wants_routers = asks_for_router_loss(layers)
    options = {"output_router_logits": True} if wants_routers else {}
    output = layers.model(**inputs, use_cache=False, **options)
    logits = output.logits.flatten(0, 1).float()
    losses = torch.nn.functional.cross_entropy(
        logits, batch.labels.flatten(), reduction="sum" if weights is None else "none"
    )
    loss = (losses if weights is None else (losses * weights).sum()) / max(1, num_labelled)
    routers = output.router_logits if wants_routers else None
    return loss + router_loss(layers, batch, num_labelled, routers) if routers else loss


def asks_for_router_loss(layers: Layers) -> bool:
    """Whether the model is a mixture of experts whose config asks for its balancing loss in training."""
    return layers.model.training and router_coefficient(layers.model) > 0


def router_coefficient(model: Any) -> float:
    """What the balancing loss of a mixture counts, from its config or, as for DBRX, from the model; 0 if it is not asked for."""
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
    names = ("router_aux_loss_coef", "aux_loss_coef")
    found = (getattr(place, name, None) for place in (config, model) for name in names)
    return next((float(value) for value in found if value is not None), 0.0)


def trunk_and_routers(layers: Layers, inputs: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """The last hidden states, and the logits of each layer's router where the model's config asks for their loss."""
    if not asks_for_router_loss(layers):
        return layers.trunk(**inputs), None
    output = layers.trunk_module(**inputs, use_cache=False, output_router_logits=True)
    return output.last_hidden_state, output.router_logits


def router_loss(layers: Layers, batch: Batch, num_labelled: int, router_logits: tuple[Tensor, ...]) -> Tensor:
    """What transformers adds for a mixture of experts: its coefficient times its balancing loss.

    A micro-batch counts by its share of the step's labelled tokens, so one micro-batch gives the very loss of transformers.

    Raises: UserError if transformers has no such loss for the model, or its gradient would be lost.
    """
    model: Any = layers.model
    balance = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    if balance is None:
        raise UserError(
            f"config.json asks for a router loss (output_router_logits), which {type(model).__name__} does not have: set "
            "output_router_logits to false in it"
        )
    config = model.config.get_text_config()
    num_experts = (
        getattr(model, "num_experts", None) or getattr(config, "num_local_experts", None) or config.num_experts
    )
    num_chosen = getattr(model, "num_experts_per_tok", None) or config.num_experts_per_tok
    loss = balance(router_logits, num_experts, num_chosen, batch.is_token.long())
    if (
        torch.is_grad_enabled()
        and not loss.requires_grad
        and any(p.requires_grad for layer in layers.decoder for p in layer.parameters())
    ):
        raise UserError(
            "the router loss that config.json asks for has no gradient here: leave gradient_checkpointing out, or set "
            "output_router_logits to false in config.json"
        )
    share = (batch.labels != IGNORED).sum() / max(1, num_labelled)
    added: Tensor = router_coefficient(model) * share * loss.to(share.device)
    return added
