"""What computes a model's attention: one of transformers' implementations, by its name there."""

from __future__ import annotations

from typing import Any

import torch

from lisatune.errors import MissingPackageError, UserError

FLASH = "flash_attention_"


def check_attention(name: str, device: torch.device, dtype: str) -> None:
    """Refuse an implementation that cannot work here, before a model is loaded.

    Raises: UserError for flash attention on a CPU, in float32, or without its package.
    """
    if not name.startswith(FLASH):
        return
    asked = f"attn_implementation={name}"
    if device.type != "cuda":
        raise UserError(f"{asked} needs an NVIDIA or AMD GPU: leave it out")
    if dtype == "float32":
        raise UserError(f"{asked} computes in 16 bits: leave it out, or set dtype=bfloat16")
    from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX
    from transformers.utils import is_kernels_available

    is_there = FLASH_ATTENTION_COMPATIBILITY_MATRIX[int(name.removeprefix(FLASH))]["general_availability_check"]
    if not is_there() and not is_kernels_available():
        raise MissingPackageError(f"{asked} needs the package flash-attn or kernels: pip install kernels")


def set_attention(model: Any, name: str, *, packing: bool = False) -> None:
    """Let ``model`` compute attention by ``name``; ``auto`` leaves what transformers chose, but packed rows need no mask.

    Raises: UserError for a model that cannot.
    """
    own = model.config._attn_implementation
    if name == "auto" and packing and _is_sdpa_throughout(model):
        from lisatune.models.packed import PACKED, register

        register()
        model.set_attn_implementation(PACKED)
    if name in ("auto", own):
        return
    if not model._can_set_attn_implementation():
        raise UserError(f"attn_implementation={name}: {type(model).__name__} has an attention of its own: leave it out")
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise UserError(f"attn_implementation={name}: {' '.join(str(error).split())[:300]}") from error


def _is_sdpa_throughout(model: Any) -> bool:
    """Whether a model and all models in it compute by ``sdpa``, and can be given another implementation."""
    from transformers import PreTrainedModel

    inside = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return all(m._can_set_attn_implementation() and m.config._attn_implementation == "sdpa" for m in inside)
