"""The paper's mean weight norms, by their definition: the slow equal of what ``norm_steps=1`` records."""

import torch
from torch import Tensor

from lisatune.layers import Layers


class MeanWeightNorms:
    """The paper's w(l): the L2 norm of each part's weights, averaged over steps.

    Args:
        layers: The model's parts, as ``find_layers`` sees it.
        trained_only: Count only parameters that ask for a gradient: of a LoRA run, the adapters.
    Cost: ``add`` reads the weights once and does not wait for the device; ``mean`` waits once.
    Reference: Pan et al., LISA, arXiv:2403.17919, its motivation.
    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lisatune import find_layers
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32,
        ...                                      num_hidden_layers=3, num_attention_heads=2))
        >>> norms = MeanWeightNorms(find_layers(model))
        >>> for step in range(2):
        ...     norms.add()  # after the optimizer's step
        >>> list(norms.mean())
        ['embedding', 'layers.0', 'layers.1', 'layers.2', 'norm', 'head']
    """

    def __init__(self, layers: Layers, *, trained_only: bool = False) -> None:
        self.layers = layers
        self.trained_only = trained_only
        self._sums: dict[str, Tensor] = {}
        self._num_steps = 0

    @torch.no_grad()
    def add(self) -> None:
        """Take in the weights as they are now."""
        for part, parameters in self.layers.parts().items():
            counted = [p for p in parameters.values() if p.requires_grad or not self.trained_only]
            if counted:
                norm = torch.linalg.vector_norm(torch.stack([_norm(p) for p in counted]))
                self._sums[part] = self._sums[part] + norm if part in self._sums else norm
        self._num_steps += 1

    def mean(self) -> dict[str, float]:
        """Part to mean norm; parts without weights are left out."""
        if not self._sums:
            return {}
        values = torch.stack([total.float() for total in self._sums.values()]).tolist()
        return {part: value / self._num_steps for part, value in zip(self._sums, values, strict=True)}


def mean_weight_norms(layers: Layers, *, trained_only: bool = False) -> dict[str, float]:
    """``MeanWeightNorms`` of one moment: the L2 norm of each part's weights as they are now."""
    norms = MeanWeightNorms(layers, trained_only=trained_only)
    norms.add()
    return norms.mean()


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float32)
