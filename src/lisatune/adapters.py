"""LoRA's adapters, from peft."""

from __future__ import annotations

import warnings
from typing import Any

from lisatune.errors import UserError, missing_package


def add_adapters(
    model: Any, *, rank: int = 16, alpha: float = 32, dropout: float = 0.0, targets: str | list[str] = "all-linear"
) -> Any:
    """``model`` with LoRA's adapters in the type of its weights, everything else frozen; needs peft.

    Args:
        model: A causal language model; peft changes it in place and wraps it.
        rank: Rank of the adapters.
        alpha: Their scale, times 1/rank.
        dropout: Before the adapters.
        targets: Modules that get adapters, as peft names them.
    Raises: UserError if no module fits ``targets``; MissingPackageError without peft.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise missing_package("peft", "method=lora", "lora") from error
    adapters = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets
    )  # fmt: skip
    first = next(model.parameters())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a name of its past
            # on the meta device the adapters are made there at once: those of 70B would fill the memory otherwise
            wrapped = get_peft_model(model, adapters, autocast_adapter_dtype=False, low_cpu_mem_usage=first.is_meta)
    except ValueError as error:
        raise UserError(f"lora_target_modules={targets}: {error}") from error
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(first.dtype)  # on the meta device peft leaves them float32
    return wrapped
