"""What a step really holds at most, from PyTorch's own books."""

import torch

from lisatune.assemble import make_learner
from lisatune.data.loader import Batch
from lisatune.memory.measure import allocated_peak, state_bytes, tensor_bytes
from tiny import VOCABULARY

WIDE = {"layers": 3, "hidden_size": 128, "intermediate_size": 384, "vocab_size": 4000}


def measured_peak(config, model, rows, tokens, drawn, documents=1):
    """Bytes that lie there before a step of rows with so many documents, and the most that PyTorch's CPU allocator adds in it."""
    learner = make_learner(config, model, torch.device("cpu"))
    learner.model.train()
    learner.method.draw_always(drawn)
    ids = torch.randint(3, VOCABULARY, (rows, tokens))
    micro = Batch(
        ids, ids, torch.arange(tokens // documents).repeat(rows, documents), torch.ones_like(ids, dtype=torch.bool)
    )
    micros = [micro] * config.gradient_accumulation_steps
    learner.step(0, micros, rows * tokens)
    held = tensor_bytes(
        [*learner.model.parameters(), *learner.model.buffers(), *learner.placement.copies()]
    ) + state_bytes(learner.optimizer)
    return held + allocated_peak(lambda: learner.step(1, micros, rows * tokens))
