"""The loss on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch

from lisatune.data.loader import Batch
from lisatune.layers import Layers
from lisatune.loss import batch_loss
from lisatune.placement.base import OnDevice


@torch.no_grad()
def held_out_loss(layers: Layers, batches: Iterable[Batch], *, linear_head: bool, placement: OnDevice) -> float:
    """Mean cross-entropy over all labelled tokens of ``batches``, in nats; every token counts the same.

    Of several processes each computes its share of every batch.

    Returns: NaN if nothing is labelled. The model is left in the mode it was in.
    """
    training = layers.model.training
    layers.model.eval()
    loss, count = 0.0, 0
    for batch in batches:
        share = placement.share(replace(batch, weights=None)).to(
            placement.device
        )  # turns' weights are of training alone
        loss += placement.call(batch_loss, layers, share, 1, linear_head=linear_head).item()
        count += batch.num_labelled
    layers.model.train(training)
    loss = placement.total(torch.tensor(loss, dtype=torch.float64)).item()
    return loss / count if count else math.nan
