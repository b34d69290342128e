"""A few steps of slices, and the weights after them: torchrun.py's neighbour, slices_of_ranks.py CASES.json."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from kinds import make_gemma, make_gpt2, make_mixtral
from lisatune.data.loader import Batch
from lisatune.layers import find_layers
from lisatune.loss import batch_loss
from lisatune.optim.adamw import AdamW
from lisatune.placement import choose_placement
from lisatune.processes.collectives import num_ranks, rank
from lisatune.processes.group import joined
from lisatune.processes.tensors import whole
from lisatune.samplers.sweep import SweepSampler
from lisatune.slices.engine import SliceEngine
from tiny import make_llama

MODELS = {
    "untied": lambda: make_llama(vocab_size=131),
    "tied": lambda: make_llama(vocab_size=131, tied=True),
    "gpt2": make_gpt2,
    "gemma": make_gemma,
    "mixtral": lambda: make_mixtral(experts=3),
}


def weights_after(case, shard_size):
    """Names to weights after four steps of three slices; each process has its share of the same rows."""
    model = MODELS[case["model"]]().to(getattr(torch, case["dtype"]))
    layers, device = find_layers(model), torch.device("cpu")
    placement = choose_placement(offload_frozen=False, shard_size=shard_size)
    linear_head = placement.place(model, layers, device)
    kind = {"factored": case["factored"], "stateless": not case["factored"]}
    optimizer = AdamW(model.parameters(), lr=1e-2, eps=1e-2, **kind)  # a small eps would make rounding an update
    engine = SliceEngine(layers, SweepSampler(3, case["num_active"]), **case["engine"])
    ids = torch.randint(5, 100, (4, 12), generator=torch.Generator().manual_seed(0))[rank() :: num_ranks()]
    batch = Batch(ids, ids.roll(-1, 1), torch.arange(12).repeat(len(ids), 1), torch.ones_like(ids, dtype=torch.bool))
    for step in range(4):
        engine.begin_step(step, optimizer)
        (batch,) = placement.passes([batch])
        placement.call(batch_loss, layers, batch, 48, linear_head=linear_head).backward()
        if case["dtype"] == "bfloat16":  # gradients that are equal to the bit, so that the rounding of the update shows
            for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
                p.grad.copy_(p.detach())
        optimizer.step()
        optimizer.zero_grad()
    trained = engine.num_trainable()
    engine.release()
    weights = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    return weights | {"trained": torch.tensor(trained)}


def main(path):
    with joined():
        for number, case in enumerate(json.loads(Path(path).read_text())):
            weights = weights_after(case, case["shard_size"])
            if rank() == 0:
                save_file(weights, Path(path).with_name(f"{number}.safetensors"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
