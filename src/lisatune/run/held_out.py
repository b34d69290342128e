"""The loss on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lisatune.data.loader import Batch
from lisatune.layers import Layers
from lisatune.loss import batch_loss
from lisatune.processes.collectives import num_ranks, rank, total


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
