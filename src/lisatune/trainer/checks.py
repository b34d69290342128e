"""What ``LisaCallback`` refuses before the first step."""

from __future__ import annotations

from typing import Any

from torch import nn

from lisatune.errors import UserError
from lisatune.layers import Layers, Trains
from lisatune.loss import router_coefficient


def check_adapters(model: Any) -> None:
    """Refuse a model whose weights are not what would train."""
    if hasattr(model, "peft_config"):
        raise UserError("LisaCallback trains weights, but this model has adapters: pass the model without peft_config")


def check_alone(own_states: Any) -> None:
    """Refuse two callbacks: each would freeze what the other trains.

    Args:
        own_states: What the Trainer's state holds of callbacks of this class: one state, or a list of several.
    """
    if isinstance(own_states, list):
        raise UserError(f"this Trainer has {len(own_states)} LisaCallbacks, which would undo each other: give it one")


def check_causal(layers: Layers) -> str:
    """Refuse a next-token loss on a model whose tokens see later ones. Returns what could not be checked, in words.

    Masked models are no causal classes, and keep their own loss.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = type(layers.model).__name__
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or next(layers.model.parameters()).is_meta:
        return ""
    try:
        causal = layers.is_causal()
    except Exception as error:  # whatever a model's own code does that needs more than tokens
        return f"{name} was not tried on tokens alone ({' '.join(str(error).split())[:120]})"
    if not causal:
        raise UserError(
            f"every token of {name} sees later tokens, so a next-token loss teaches nothing: set is_decoder=True in the "
            "model's config, or train a masked model (AutoModelForMaskedLM) with its own loss"
        )
    return ""


def router_remark(model: Any, accumulation: int) -> str:
    """What the Trainer makes of a mixture's balancing loss; nothing where it counts as the model's config says."""
    if accumulation < 2 or not hasattr(model, "config") or not router_coefficient(model):
        return ""
    return (
        f"the Trainer adds the router loss once for each micro-batch, {accumulation} times a step: divide its coefficient in the "
        f"model's config by {accumulation}"
    )


def check_checkpointing(model: nn.Module, train_embedding: Trains, num_processes: int) -> None:
    """Refuse reentrant checkpoints above a frozen embedding, and on several processes.

    Without a gradient of their inputs they give none. And each is a backward pass of its own, so that nobody can tell
    when the last gradient has come.
    """
    if train_embedding is True and num_processes == 1:
        return
    why = f"gives no gradients if train_embedding={train_embedding}"
    if num_processes > 1:
        why = "does not work on several processes"
    for module in model.modules():
        options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        if getattr(module, "gradient_checkpointing", False) and options.get("use_reentrant", False):
            raise UserError(
                f"gradient checkpointing with use_reentrant=True {why}: "
                'set gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
