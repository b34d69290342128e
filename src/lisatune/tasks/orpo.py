"""Odds ratio preference optimization (Hong et al., arXiv:2403.07691)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from lisatune.tasks.base import Task, meta_ids


@dataclass(kw_only=True)
class Orpo(Task):
    """Learns the chosen answer, and makes the rejected one less likely. It needs no reference model."""

    trainer: ClassVar[str] = "trl.experimental.orpo:ORPOTrainer"
    arguments: ClassVar[str] = "ORPOConfig"

    beta: float

    def options(self) -> dict[str, Any]:
        """Names are TRL's."""
        return {"beta": self.beta}

    def step_loss(self, model: Any, reference: Any, rows: int, tokens: int) -> Tensor:
        """Both answers of a row go through the model together. TRL holds the logits of all tokens here."""
        from trl.trainer.utils import selective_log_softmax

        ids = meta_ids(2 * rows, tokens)
        logits = model(input_ids=ids, use_cache=False).logits
        nll = cross_entropy(logits[:rows, :-1].contiguous().flatten(0, 1), ids[:rows, 1:].flatten())
        chosen, rejected = selective_log_softmax(logits[:, :-1], ids[:, 1:]).mean(1).chunk(2)
        return nll - self.beta * logsigmoid(chosen - rejected).mean()
