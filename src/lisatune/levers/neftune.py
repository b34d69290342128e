"""Noise on the embedded tokens: NEFTune (arXiv:2310.05914), as transformers adds it."""

from __future__ import annotations

from dataclasses import dataclass

from lisatune.layers import Layers
from lisatune.levers.base import Lever


@dataclass(kw_only=True)
class Neftune(Lever):
    """Adds uniform noise of at most alpha / sqrt(positions * width) to what the embedding gives, while the model trains.

    The noise comes from PyTorch's generator, which each step seeds: it depends on the seed and the step alone. A step on
    several processes gives each its own noise.
    """

    neftune_noise_alpha: float

    def on_model(self, layers: Layers) -> None:
        """Hang the noise on the embedding."""
        from transformers.integrations.neftune import neftune_post_forward_hook  # it loads peft, which takes a second

        layers.embedding.neftune_noise_alpha = self.neftune_noise_alpha  # type: ignore[assignment]
        layers.embedding.register_forward_hook(neftune_post_forward_hook)
