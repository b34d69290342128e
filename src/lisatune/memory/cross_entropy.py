"""The loss over a large vocabulary, without the logits of all tokens.

Shapes: N tokens, D width, V vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    num_labelled: int | None = None,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Cross-entropy of ``hidden @ weight.T + bias`` against ``labels``, a few tokens at a time.

    Same value as ``F.cross_entropy((hidden @ weight.T + bias).float(), labels)``, but only labelled tokens are
    multiplied by the head at all, and the logits of only ``chunk_tokens`` of them exist at once, forward and backward:
    N * V * 4 bytes become chunk_tokens * V * 4. The gradients are made in the forward pass, where the logits are, so
    nothing is computed twice; those of a frozen ``weight`` are not made.

    Args:
        hidden: Last hidden states, shape (N, D), any floating dtype.
        weight: Output embedding, shape (V, D), dtype of ``hidden``.
        labels: Next-token ids, already shifted, shape (N,), int64; -100 means no target.
        bias: Of the head, shape (V,), if it has one.
        num_labelled: Divisor of the summed loss; the whole step's count when accumulating. Default: this call's.
        chunk_tokens: Changes memory and speed, never the loss.
    Returns: Scalar float32; 0.0 with zero gradients when nothing is labelled.
    Raises: ValueError if ``hidden`` and ``labels`` differ in N.
    Reference: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, arXiv:2411.09009.
    Example:
        >>> h, w, y = torch.randn(6, 4), torch.randn(10, 4), torch.tensor([1, 2, -100, 3, 4, 5])
        >>> torch.allclose(linear_cross_entropy(h, w, y, chunk_tokens=4),
        ...                torch.nn.functional.cross_entropy(h @ w.T, y))
        True
    """
    if hidden.shape[:1] != labels.shape:
        raise ValueError(f"hidden has {hidden.shape[0]} tokens, but labels have shape {tuple(labels.shape)}")
    labelled = (labels != IGNORED).nonzero().squeeze(1)
    divisor = max(1, len(labelled) if num_labelled is None else num_labelled)
    if not torch.is_grad_enabled():  # else gradients would be made here that nobody asks for
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden.index_select(0, labelled), weight, bias, labels[labelled], divisor, chunk_tokens
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, divisor: int, chunk_tokens: int
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        grad_bias = torch.zeros_like(bias) if bias is not None and wants_bias else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits_CV = torch.nn.functional.linear(hidden[rows], weight, bias).float()
            target = labels[rows, None]
            log_normaliser = logits_CV.logsumexp(1, keepdim=True)
            loss += (log_normaliser - logits_CV.gather(1, target)).sum()
            if grad_hidden is None and grad_weight is None and grad_bias is None:
                continue
            # d loss / d logits = (softmax - one-hot) / divisor, made in place of the logits
            grad = logits_CV.sub_(log_normaliser).exp_()
            grad.scatter_add_(1, target, torch.full_like(target, -1, dtype=grad.dtype))
            grad = grad.div_(divisor).to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, hidden[rows])
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return loss / divisor

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        grads = (None if grad is None else grad.mul_(scale.to(grad.dtype)) for grad in ctx.saved_tensors)
        return (*grads, None, None, None)
