"""Full fine-tuning: every weight trains in every step."""

from __future__ import annotations

from dataclasses import dataclass

from lisatune.methods.base import Method


@dataclass(kw_only=True)
class Full(Method):
    """Trains all weights of the model. What LISA is compared with."""
