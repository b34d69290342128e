"""Direct preference optimization (Rafailov et al., arXiv:2305.18290)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lisatune.tasks import PAIRS
from lisatune.tasks.base import Answer, Task, log_probs


@dataclass(kw_only=True)
class Dpo(Task):
    """Makes the chosen answer likelier than the rejected one, against a reference model."""

    trainer: ClassVar[str] = "trl:DPOTrainer"
    arguments: ClassVar[str] = "DPOConfig"

    names: ClassVar[tuple[str, ...]] = PAIRS

    beta: float
    precompute_ref_log_probs: bool

    def options(self) -> dict[str, Any]:
        """Names are TRL's."""
        return {"beta": self.beta, "precompute_ref_log_probs": self.precompute_ref_log_probs}

    @property
    def needs_reference(self) -> bool:
        """Unless its log-probabilities are computed before training, by the model itself."""
        return not self.precompute_ref_log_probs

    def answers(self, row: Mapping[str, Any]) -> list[Answer]:
        """Prompt and answers stand apart."""
        prompt = list(row["prompt_ids"])
        return [Answer(name, prompt + list(row[f"{name}_ids"]), len(prompt)) for name in self.names]

    def why_left_out(self, answers: Sequence[Answer], max_length: int) -> str:
        """Of such a row nothing could be learned."""
        return "the prompt fills max_length" if answers[0].num_prompt >= max_length else ""

    def step_loss(self, model: Any, reference: Any, rows: int, tokens: int) -> Tensor:
        """Both answers of a row go through the model together, then through the reference."""
        ours = log_probs(model, 2 * rows, tokens)
        theirs = torch.empty_like(ours)
        if self.needs_reference:
            with torch.no_grad():
                theirs = log_probs(reference or model, 2 * rows, tokens)
        chosen, rejected = (ours - theirs).chunk(2)
        return -logsigmoid(self.beta * (chosen - rejected)).mean()
