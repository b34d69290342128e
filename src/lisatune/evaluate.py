"""Held-out loss, and answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lisatune.data.loader import Batch
from lisatune.distributed import num_ranks, rank, total
from lisatune.layers import Layers
from lisatune.memory.cross_entropy import linear_cross_entropy
from lisatune.memory.row_gradient import RowGradients
from lisatune.slices.blocks import cut_of
from lisatune.slices.functions import whole_weight


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
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    if linear_head:
        assert isinstance(layers.head, nn.Linear)
        hidden = layers.trunk(**inputs).flatten(0, 1)
        weight, bias = layers.head.weight, layers.head.bias
        bias_cut = cut_of(bias)
        return linear_cross_entropy(
            hidden, weight, batch.labels.flatten(), bias=whole_weight(bias_cut) if bias_cut else bias,
            num_labelled=num_labelled, row_gradients=row_gradients, cut=cut_of(weight),
        )  # fmt: skip
    logits = layers.model(**inputs, use_cache=False).logits.flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), reduction="sum") / max(1, num_labelled)


@torch.no_grad()
def held_out_loss(
    layers: Layers, batches: Iterable[Batch], *, linear_head: bool, device: torch.device,
    call: Callable[..., Tensor] = lambda function, *args, **kwargs: function(*args, **kwargs),
) -> float:  # fmt: skip
    """Mean cross-entropy over all labelled tokens of ``batches``, in nats; every token counts the same.

    Of several processes each computes its share of every batch. ``call`` is ``Learner.call``.

    Returns: NaN if nothing is labelled. The model is left in the mode it was in.
    """
    training = layers.model.training
    layers.model.eval()
    loss, count = 0.0, 0
    for batch in batches:
        share = batch.share(rank(), num_ranks()) if num_ranks() > 1 else batch
        loss += call(batch_loss, layers, share.to(device), 1, linear_head=linear_head).item()
        count += batch.num_labelled
    layers.model.train(training)
    if num_ranks() > 1:
        loss = total(torch.tensor(loss, dtype=torch.float64)).item()
    return loss / count if count else math.nan


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int = 64) -> Iterator[str]:
    """The model's greedy answers to ``prompts``, each a chat of one question."""
    training = model.training
    model.eval()
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        out = model.generate(**ids, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        yield tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    model.train(training)
