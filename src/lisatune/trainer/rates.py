"""Learning rates by part, for an optimizer that a Trainer is given."""

from __future__ import annotations

from typing import Any

from torch import nn

from lisatune.layers import find_layers
from lisatune.optim.build import parameter_groups


def rates_by_part(
    model: nn.Module,
    learning_rate: float,
    *,
    weight_decay: float = 0.0,
    embedding_lr_ratio: float = 1.0,
    head_lr_ratio: float | None = None,
    norm_lr_ratio: float = 1.0,
    factored: bool = False,
    spectral: bool = False,
    decoder_name: str | None = None,
) -> list[dict[str, Any]]:
    """Groups of parameters for an optimizer, with the learning rates that ``lisatune train`` has under these names.

    The Trainer's schedule multiplies the rate of each group.

    Args:
        model: The model, before anything is frozen.
        learning_rate: Peak learning rate of the decoder layers' matrices.
        weight_decay: Decay of matrices; vectors have none.
        embedding_lr_ratio: Learning rate of the embedding, as a multiple of ``learning_rate``.
        head_lr_ratio: The same for the head. Default: 1, or ``embedding_lr_ratio`` if the two are tied.
        norm_lr_ratio: The same for norms and biases.
        factored: For ``lisatune.AdamW``: the steps of ``optim=factored``.
        spectral: For ``lisatune.AdamW``: the steps of ``optim=spectral``.
        decoder_name: Dotted path of the decoder layers, where ``find_layers`` does not recognise them.
    Raises: UserError for a ``head_lr_ratio`` of a tied head.
    Example:
        >>> from torch.optim import AdamW
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                                      num_attention_heads=2))
        >>> optimizer = AdamW(rates_by_part(model, 1e-4, embedding_lr_ratio=0.1))
        >>> [group["lr"] for group in optimizer.param_groups]
        [1e-05, 0.0001, 0.0001]
    """
    groups = parameter_groups(
        find_layers(model, decoder_name), model, weight_decay=weight_decay, embedding_lr_ratio=embedding_lr_ratio,
        head_lr_ratio=head_lr_ratio, norm_lr_ratio=norm_lr_ratio, factored=factored or spectral, spectral=spectral,
    )  # fmt: skip
    kept = ("params", "weight_decay", *(("factored", "spectral") if factored or spectral else ()))
    return [{key: group[key] for key in kept} | {"lr": learning_rate * group["lr_ratio"]} for group in groups]
