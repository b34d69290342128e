"""Optimizer steps of a tiny model, taken with every lever."""

import torch

from lisatune.assemble import make_learner
from lisatune.data.loader import Batch
from lisatune.processes.tensors import whole as whole_of_shards
from lisatune.settings import build_config
from tiny import VOCABULARY, make_llama

CPU = torch.device("cpu")


def config(**settings):
    """Settings of LISA with layers, unless they say otherwise."""
    needed = {"model": "-", "data": "-", "output": "-", "dtype": "float32", "learning_rate": 1e-2}
    if settings.get("method", "lisa") == "lisa" and "sampled_unit" not in settings:
        needed["recipe"] = "paper"
    return build_config(needed | settings)


def batch(step, rows=4, tokens=12):
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(step))
    labels = ids.roll(-1, 1)
    labels[step % rows, : 3 + step % 5] = -100  # micro-batches of unequal numbers of labelled tokens
    positions = torch.arange(tokens).repeat(rows, 1)
    return Batch(ids, labels, positions, torch.ones_like(ids, dtype=torch.bool))


def run(steps=9, micro_rows=4, tied=False, **settings):
    """Weights, losses and norms of a run over several switches."""
    if settings.get("method", "lisa") == "lisa":
        settings = {"num_active": 1, "interval_steps": 2} | settings
    dtype = getattr(torch, settings.get("dtype", "float32"))
    learner = make_learner(config(**settings), make_llama(tied=tied).to(dtype), CPU)
    learner.model.train()
    told = []
    for step in range(steps):
        whole = batch(step)
        share = learner.placement.share(whole)
        loss, norm, _ = learner.step(step, share.split(micro_rows), whole.num_labelled)
        told.append((loss.item(), norm.item()))
    weights = {n: p for n, p in learner.model.named_parameters() if p.numel()}  # a slot may be left over
    return {n: whole_of_shards(p.detach()).clone() for n, p in weights.items()}, told
