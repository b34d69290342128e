"""Full fine-tuning: every weight trains in every step."""

from __future__ import annotations

from dataclasses import dataclass

from lisatune.layers import Layers
from lisatune.methods.base import Method

RATE_TIMES_WIDTH = 0.06  # SmolLM2, 576 wide, learned best at 1e-4; 7B models, 4,096 wide, often have 1e-5 to 2e-5


@dataclass(kw_only=True)
class Full(Method):
    """Trains all weights of the model. What LISA is compared with."""

    def usual_learning_rate(self, layers: Layers) -> float:
        """A rate that falls with the model's width."""
        return rate_of_width(layers)


def rate_of_width(layers: Layers) -> float:
    """The learning rate of all weights that is usual for a model of this width.

    The step of Adam, and of the sign, has a fixed size in each element. So what a matrix makes of its input changes by more
    where more inputs are added up.

    Reference: Yang et al., Tensor Programs V, arXiv:2203.03466, for rates that fall with the width.
    """
    width = next(p.shape[-1] for p in layers.embedding.parameters() if p.ndim == 2)
    return RATE_TIMES_WIDTH / width
