"""Odds ratio preference optimization (Hong et al., arXiv:2403.07691)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from lisatune.tasks import PAIRS
from lisatune.tasks.base import Answer, Task, meta_ids

IGNORED = -100  # the label of a prompt


@dataclass(kw_only=True)
class Orpo(Task):
    """Learns the chosen answer, and makes the rejected one less likely. It needs no reference model."""

    trainer: ClassVar[str] = "trl.experimental.orpo:ORPOTrainer"
    arguments: ClassVar[str] = "ORPOConfig"

    beta: float

    def options(self) -> dict[str, Any]:
        """Names are TRL's."""
        return {"beta": self.beta}

    def answers(self, row: Mapping[str, Any]) -> list[Answer]:
        """The labels say where an answer begins."""
        num_prompt = {name: list(row[f"{name}_labels"]).count(IGNORED) for name in PAIRS}
        return [Answer(name, list(row[f"{name}_input_ids"]), num_prompt[name], whole_prompt=True) for name in PAIRS]

    def step_loss(self, model: Any, reference: Any, rows: int, tokens: int) -> Tensor:
        """Both answers of a row go through the model together. TRL holds the logits of all tokens here."""
        from trl.trainer.utils import selective_log_softmax

        ids = meta_ids(2 * rows, tokens)
        logits = model(input_ids=ids, use_cache=False).logits
        nll = cross_entropy(logits[:rows, :-1].contiguous().flatten(0, 1), ids[:rows, 1:].flatten())
        chosen, rejected = selective_log_softmax(logits[:, :-1], ids[:, 1:]).mean(1).chunk(2)
        return nll - self.beta * logsigmoid(chosen - rejected).mean()
