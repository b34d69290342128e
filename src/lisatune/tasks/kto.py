"""Kahneman-Tversky optimization (Ethayarajh et al., arXiv:2402.01306)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lisatune.tasks.base import log_probs
from lisatune.tasks.dpo import Dpo


@dataclass(kw_only=True)
class Kto(Dpo):
    """Makes good answers likelier and bad ones less likely, against a reference model."""

    trainer = "trl:KTOTrainer"
    arguments = "KTOConfig"
    names = ("completion",)

    def step_loss(self, model: Any, reference: Any, rows: int, tokens: int) -> Tensor:
        """Answers of other rows are scored first, without gradients, then the rows' own; then both by the reference."""
        with torch.no_grad():
            others = log_probs(model, rows, tokens)
        ours = log_probs(model, rows, tokens)
        theirs = torch.empty_like(ours)
        if self.needs_reference:
            with torch.no_grad():
                others = others - log_probs(reference or model, rows, tokens)
                theirs = log_probs(reference or model, rows, tokens)
        return (1 - torch.sigmoid(self.beta * (ours - theirs - others.mean()))).mean()
