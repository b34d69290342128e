"""Layer to score: how much a layer matters, by one measure or another.

What a measure is worth is open: the paper samples uniformly although it begins from the first one below, and follow-ups
each propose another. Any of them can weigh a ``WeightedSampler``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lisatune.errors import UserError
from lisatune.layers import Layers


def weight_norm_ratio(lora_norms: Mapping[str, float], full_norms: Mapping[str, float]) -> dict[str, float]:
    """The paper's p(l) = w~(l) / w(l): mean weight norm of a LoRA run over that of a full-parameter run.

    To train a layer with this probability at the full run's learning rate would move it, in expectation, as far as LoRA
    does. Two things are known of it. The paper does not use it: it sets embedding and head to 1 and all decoder layers
    to gamma / N_L. And its LoRA norms, read off the figure, are those that adapters have before any training, to within
    a few percent (Llama-2-7B at rank 128: 724, 17.3 and 6.5 for embedding, decoder layer and head by initialisation
    alone; 715 to 750, 16.9 and 6.5 in the figure). A ratio of such norms tells the shapes of the modules and how
    adapters are initialised, hardly what was learned: compare norms of step 0 before trusting one.

    Args:
        lora_norms: Part to mean norm in a LoRA run (w~), as a run with ``norm_steps=1`` records it (``mean_norm``).
        full_norms: The same of the full-parameter run, of the same parts.
    Returns: Part to ratio; above 1 where LoRA's norm is the larger, as the paper's is at the embedding.
    Raises: UserError if a part is in one run only, or if its norm in the full run is 0.
    Reference: Pan et al., LISA, arXiv:2403.17919, its motivation.
    Example:
        >>> weight_norm_ratio({"embedding": 724.0, "layers.0": 17.0}, {"embedding": 196.0, "layers.0": 268.0})
        {'embedding': 3.693877551020408, 'layers.0': 0.06343283582089553}
    """
    for part in lora_norms.keys() ^ full_norms.keys():
        raise UserError(f"only one of the two runs has a norm of {part}: give two runs with the same parts")
    for part, norm in full_norms.items():
        if norm == 0:
            raise UserError(f"the norm of {part} in the full run is 0, so there is no ratio to it")
    return {part: lora_norms[part] / norm for part, norm in full_norms.items()}


def gradient_sq_norms(layers: Layers, pool: Sequence[str] | None = None, *, mean: bool = False) -> dict[int, float]:
    """Layer to the sum of its gradient's squares, for the layers that have a gradient.

    ``sampler.observe(step, gradient_sq_norms(layers, mean=True))`` feeds a sampler that learns. To be called after the
    backward pass, before gradients are clipped, stepped on or let go.

    Args:
        layers: The model's parts.
        pool: What the keys count, as ``layers.pool`` gives it. Default: the decoder layers.
        mean: Divide by the number of elements, so that layers of different sizes compare.
    Returns: Index in the pool to value, in float32 arithmetic whatever the gradients are.
    Cost: reads the gradients of the active layers once; waits for the device once.
    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lisatune import find_layers
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32,
        ...                                      num_hidden_layers=3, num_attention_heads=2))
        >>> for p in model.model.layers[1].parameters():
        ...     p.grad = torch.full_like(p, 2.0)
        >>> gradient_sq_norms(find_layers(model), mean=True)
        {1: 4.0}
    """
    parts = layers.parts()
    pool = [f"layers.{i}" for i in range(len(layers.decoder))] if pool is None else pool
    sums: dict[int, Tensor] = {}
    sizes: dict[int, int] = {}
    for index, part in enumerate(pool):
        gradients = [p.grad for p in parts[part].values() if p.grad is not None]
        if gradients:
            sums[index] = torch.stack([_norm(g) for g in gradients]).square().sum()
            sizes[index] = sum(g.numel() for g in gradients)
    if not sums:
        return {}
    values = torch.stack(list(sums.values())).tolist()
    return {index: value / (sizes[index] if mean else 1) for index, value in zip(sums, values, strict=True)}


@torch.no_grad()
def outlier_scores(
    layers: Layers, input_norms: Mapping[str, Tensor] | None = None, multiple: float = 5.0
) -> dict[int, float]:
    """Layer to the share of its weights that are outliers: the layerwise outlier distribution of OWS.

    The magnitude of weight (i, j) is abs(W[i, j]) * norm(x[j]), and it is an outlier if it exceeds ``multiple`` times
    the mean magnitude of its layer. OWS draws a layer in proportion to this share.

    Args:
        layers: The model's parts; all matrices of the decoder layers count.
        input_norms: What ``input_norms`` measured; then only matrices with a norm count. Default: weights alone, 1
            for each norm, which needs no data, and is OWL's variant for pruning by magnitude.
        multiple: OWL's scripts have 5; the scores that the authors of OWS publish for Llama-2-7B are named after 13, by
            which hardly any weight alone is an outlier: of normally distributed ones none.
    Returns: Index of the decoder layer to share, 0 to 1.
    Cost: two reads of the weights, and two float32 copies of one matrix; waits for the device once.
    Raises: UserError if a layer has no matrix that counts.
    Reference: Li et al., OWS, arXiv:2405.18380; Yin et al., OWL, arXiv:2310.05175.
    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lisatune import find_layers
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32,
        ...                                      num_hidden_layers=2, num_attention_heads=2))
        >>> for p in model.model.layers.parameters():
        ...     _ = p.data.fill_(0.01)
        >>> _ = model.model.layers[1].mlp.up_proj.weight.data[:4, :5].fill_(1.0)  # 20 of the layer's 2,560
        >>> outlier_scores(find_layers(model))
        {0: 0.0, 1: 0.0078125}
    """
    counts, sizes, parts = [], [], layers.parts()
    for part in (f"layers.{i}" for i in range(len(layers.decoder))):
        matrices = {name: p for name, p in parts[part].items() if p.ndim >= 2}
        if input_norms is not None:
            matrices = {name: p for name, p in matrices.items() if name in input_norms}
        if not matrices:
            raise UserError(
                f"{part} has no matrix" + (" whose inputs were measured" if input_norms is not None else "")
            )

        def magnitudes(name: str, p: Tensor) -> Tensor:
            return p.float().abs() if input_norms is None else p.float().abs() * input_norms[name]

        numel = sum(p.numel() for p in matrices.values())
        total = torch.stack([magnitudes(name, p).sum() for name, p in matrices.items()]).sum()
        bound = multiple * total / numel
        counts.append(torch.stack([(magnitudes(name, p) > bound).sum() for name, p in matrices.items()]).sum())
        sizes.append(numel)
    return {i: count / sizes[i] for i, count in enumerate(torch.stack(counts).tolist())}


@torch.no_grad()
def input_norms(layers: Layers, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The size of what each matrix of the decoder layers is multiplied with: root mean square of each input.

    Args:
        layers: The model's parts; its linear layers are watched, GPT-2's ``Conv1D`` too. Stacked matrices of experts
            are not, since nobody calls them one by one.
        batches: What the trunk takes, for example ``{"input_ids": ids}``; a few thousand tokens will do, padding
            counted.
    Returns: Name of the weight to float32 norms, in a shape that multiplies it: one for each column, of a Conv1D row.
    Cost: a forward pass for each batch.
    Raises: UserError if ``batches`` is empty.
    Reference: Yin et al., OWL, arXiv:2310.05175, whose norm it is but for a factor that all matrices share.
    """
    names = {id(p): name for part in layers.parts().values() for name, p in part.items()}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        name = names[id(module.weight)]
        sums[name] = sums.get(name, 0) + x.square().sum(dim=0)
        counts[name] = counts.get(name, 0) + x.shape[0]

    turned = {}  # whether inputs lie along the rows of the weight
    handles = []
    for layer in layers.decoder:
        for module in layer.modules():
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                turned[names[id(module.weight)]] = not isinstance(module, nn.Linear)
                handles.append(module.register_forward_pre_hook(watch))
    training = layers.model.training
    layers.model.eval()
    try:
        for batch in batches:
            layers.trunk(**batch)
    finally:
        layers.model.train(training)
        for handle in handles:
            handle.remove()
    if not sums:
        raise UserError("no input reached a linear layer: give at least one batch")
    norms = {name: (total / max(1, counts[name])).sqrt() for name, total in sums.items()}
    return {name: norm[:, None] if turned[name] else norm for name, norm in norms.items()}


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float32)
    return norm
