"""The gradient of a vocabulary matrix, made and used a block of rows at a time.

Shapes: V vocabulary, D width, N tokens of a micro-batch, R rows of a block, K tokens of the batch whose row is in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lisatune.errors import UserError


class GradientTerm(Protocol):
    """What one use of the matrix in one micro-batch adds to its gradient."""

    def block(self, weight: Tensor, start: int, stop: int, max_elements: int) -> Tensor:
        """Rows ``start`` to ``stop``, float32 (R, D), no temporary but one row or token larger than ``max_elements``."""
        ...


class RowGradients:
    """Gradients of embeddings and heads as what they are made from, instead of (V, D) each.

    The gradient of a vocabulary matrix is the largest of a model that trains few layers: 1 GiB at Llama-3.1-8B, as much
    as that of two and a half decoder layers. Most of the embedding's is zeros, and the head's is one product away. So
    ``watch_embedding`` and ``linear_cross_entropy(row_gradients=...)`` leave parts here in the backward pass (N * D
    numbers each), and ``AdamW(row_gradients=...)`` asks for blocks, uses them and lets them go.

    It is right to update a block in place before the next is made: a block's gradient reads the rows of its own block
    alone, and what all rows have a share in, the log-normaliser, is kept from the forward pass. But a pass over all
    blocks that comes before the update, for the norm, must be over when the first block is updated.

    Blocks are float32, whatever the weights are. A dense bfloat16 gradient is rounded at each micro-batch and each use
    of a tied matrix; a block is small enough to do without, and the optimizer computes in float32 anyway. In float32
    on a CPU the embedding's blocks equal the dense gradient to the bit, parts summed as autograd sums; the head's equal
    it to rounding.

    Args:
        block_elements: The most elements of one temporary.
    Attributes:
        add_up: Sums a block over the processes, in place. All of them make the same blocks in the same order.
    Cost: of the embedding, K * D additions for a block. Of the head, a product of N * R * D for the logits and another
        for the gradient: over all blocks one product of N * V * D more than the dense way.
    Example:
        >>> embedding, store = nn.Embedding(10, 4), RowGradients()
        >>> handle = watch_embedding(embedding, store)
        >>> embedding(torch.tensor([1, 7, 7])).sum().backward()
        >>> embedding.weight.grad is None, store.block(embedding.weight, 6, 8).tolist()
        (True, [[0.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    """

    def __init__(self, block_elements: int = 2**22) -> None:
        self.block_elements = block_elements
        self.add_up: Callable[[Tensor], Tensor] = lambda block: block
        self._parts: dict[Tensor, list[GradientTerm]] = {}
        self._factor: Tensor | float = 1.0

    def add(self, p: Tensor, part: GradientTerm) -> None:
        """Add ``part`` to the gradient of ``p``, as backward adds to ``p.grad``."""
        self._parts.setdefault(p, []).append(part)

    def __contains__(self, p: object) -> bool:
        return p in self._parts

    def parameters(self) -> list[Tensor]:
        """The parameters that have a gradient here."""
        return list(self._parts)

    @torch.no_grad()
    def block(self, p: Tensor, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the gradient of ``p``: a new tensor, float32, shape (stop - start, D)."""
        first, *others = (part.block(p.detach(), start, stop, self.block_elements) for part in self._parts[p])
        for other in others:
            first += other
        return (first if p.is_meta else self.add_up(first)).mul_(self._factor)  # a forecast makes a few blocks alone

    @torch.no_grad()
    def sq_norm(self, p: Tensor) -> Tensor:
        """The sum of the squares of the whole gradient of ``p``; scalar, float32. Call it before any update.

        Cost: every block is made, and made again for the update: for the head two more products of N * V * D.
        """
        rows = max(1, self.block_elements // p.shape[1])
        total = torch.zeros((), device=p.device)
        for start in (0,) if p.is_meta else range(0, len(p), rows):
            block = self.block(p, start, min(start + rows, len(p))).view(-1)
            total += torch.dot(block, block)  # vector_norm sums one after the other: 2e-4 wrong at 2**22 on a CPU
        return total

    def scale(self, factor: Tensor | float) -> None:
        """Multiply all gradients by ``factor``, when their blocks are made; for clipping, after the last backward."""
        self._factor = self._factor * factor

    def drop(self, p: Tensor) -> None:
        """Forget the gradient of ``p``."""
        self._parts.pop(p, None)

    def clear(self) -> None:
        """Forget all gradients, and the factor."""
        self._parts.clear()
        self._factor = 1.0


@dataclass
class EmbeddingPart:
    """Gradient of an input embedding: each token adds its output gradient to its row.

    Args:
        ids: Token ids, shape (N,), int64.
        grads: Gradients of the embedding's outputs, shape (N, D).
        padding_idx: The row that gets no gradient, if there is one.
    """

    ids: Tensor
    grads: Tensor
    padding_idx: int | None = None

    def __post_init__(self) -> None:
        # sorted once, so that a block costs its own tokens alone; stable, so that a row's sum runs in the tokens' order
        self.ids, self._order = self.ids.sort(stable=True)
        # a copy to search in: asking the device for bounds would make the CPU wait at every block
        self._ids_host = None if self.ids.is_meta else self.ids.cpu()

    def block(self, weight: Tensor, start: int, stop: int, max_elements: int) -> Tensor:
        """See ``GradientTerm``. On the meta device, where ids have no values, all tokens are taken to be of this block."""
        total = weight.new_zeros((stop - start, weight.shape[1]), dtype=torch.float32)
        first, last = 0, len(self.ids)
        if self._ids_host is not None:
            first, last = torch.searchsorted(self._ids_host, torch.tensor([start, stop])).tolist()
        tokens = max(1, max_elements // weight.shape[1])
        for low in range(first, last, tokens):
            chosen = slice(low, min(low + tokens, last))
            _add_rows(total, self.ids[chosen] - start, self.grads[self._order[chosen]].float())
        if self.padding_idx is not None and start <= self.padding_idx < stop:
            total[self.padding_idx - start] = 0
        return total


def _add_rows(total: Tensor, rows: Tensor, values: Tensor) -> None:
    if total.device.type == "cuda":  # index_add_ sums in any order there, and two runs would differ
        total.index_put_((rows,), values, accumulate=True)
    else:
        total.index_add_(0, rows, values)


@dataclass
class HeadPart:
    """Gradient of an output embedding under cross-entropy: ``scale * (softmax - one_hot).T @ hidden``, made from the weight.

    Args:
        hidden: Last hidden states of labelled tokens, shape (N, D).
        labels: Their labels, shape (N,), int64.
        log_normaliser: Log-normaliser of their logits, shape (N,), float32.
        bias: Bias of the head, shape (V,), if it has one: as it was in the forward pass.
        scale: What the gradient of each token's loss is multiplied by: shape (N, 1), float32.
    """

    hidden: Tensor
    labels: Tensor
    log_normaliser: Tensor
    bias: Tensor | None
    scale: Tensor

    def block(self, weight: Tensor, start: int, stop: int, max_elements: int) -> Tensor:
        """See ``GradientTerm``; logits of R rows exist for as many tokens at a time as fit."""
        rows = weight[start:stop]
        bias = None if self.bias is None else self.bias[start:stop]
        total = rows.new_zeros(rows.shape, dtype=torch.float32)
        tokens = max(1, max_elements // len(rows))
        for first in range(0, len(self.hidden), tokens):
            chunk = slice(first, first + tokens)
            hidden, labels = self.hidden[chunk], self.labels[chunk]
            logits = nn.functional.linear(hidden, rows, bias).float()
            softmax = logits.sub_(self.log_normaliser[chunk, None]).exp_()
            inside = (labels >= start) & (labels < stop)  # no indexing by it: the device would be asked how many
            targets = (labels - start).clamp_(0, len(rows) - 1)[:, None]
            grad = softmax.scatter_add_(1, targets, -inside.float()[:, None]).mul_(self.scale[chunk]).to(hidden.dtype)
            if total.dtype == hidden.dtype:
                total.addmm_(grad.T, hidden)
            else:
                total += grad.T @ hidden
        return total


def watch_embedding(embedding: nn.Module, store: RowGradients) -> RemovableHandle:
    """Make ``embedding`` put its weight's gradient into ``store`` in parts, never as a whole.

    Nothing changes while its weight asks for no gradient, or none is recorded (LISA may freeze and unfreeze it).

    Args:
        embedding: An ``nn.Embedding``, or a subclass with the same forward.
        store: Given to the optimizer too, else the weight does not train.
    Returns: A handle whose ``remove()`` ends it. Watched twice, it would leave its gradient twice, so that is refused.
    Raises: UserError for a class with a forward of its own (Gemma3's scales its output), for ``max_norm``,
        ``scale_grad_by_freq`` and ``sparse``, and for an embedding that is watched already.
    Cost: N * D numbers are held from the backward pass to ``store.clear()``.
    """
    name = type(embedding).__name__
    own_forward = type(embedding).forward is not nn.Embedding.forward or "forward" in vars(embedding)
    if not isinstance(embedding, nn.Embedding) or own_forward:
        raise UserError(
            f"the embedding is of class {name}, which has a forward of its own: leave vocabulary_blocks (RowGradients) out"
        )
    if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
        raise UserError(
            f"the embedding ({name}) has max_norm, scale_grad_by_freq or sparse set: leave vocabulary_blocks (RowGradients) out"
        )
    if any(isinstance(hook, _LeaveParts) for hook in embedding._forward_hooks.values()):
        raise UserError(f"the embedding ({name}) is watched already: remove() the handle of the first time")
    return embedding.register_forward_hook(_LeaveParts(store))


@dataclass
class _LeaveParts:
    """Forward hook that puts a node of ours in place of the embedding's in the autograd graph."""

    store: RowGradients

    def __call__(self, embedding: nn.Embedding, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not output.requires_grad:
            return None
        (ids,) = args
        replaced: Tensor = _EmbeddingRows.apply(  # type: ignore[no-untyped-call]
            output.detach(), embedding.weight, ids, embedding.padding_idx, self.store
        )
        return replaced


class _EmbeddingRows(torch.autograd.Function):
    """Hands ``output`` on, and at backward leaves what the weight's gradient is made from."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, weight: Tensor, ids: Tensor, padding_idx: int | None, store: RowGradients
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding_idx, ctx.store = weight, padding_idx, store
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, ...]:
        (ids,) = ctx.saved_tensors
        grads = grad_outputs[0].flatten(0, -2)
        ctx.store.add(ctx.weight, EmbeddingPart(ids.flatten(), grads, ctx.padding_idx))
        return None, None, None, None, None
