"""Models and tokenizers, from a folder, a GGUF file or the hub, and back to a folder."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch

from lisatune.errors import UserError, missing_package
from lisatune.models.names import check_model_name


def load_model(
    name: str, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False
) -> tuple[torch.nn.Module, Any]:
    """A causal language model, trainable as its authors built it, in evaluation mode, and its tokenizer, on the CPU.

    Args:
        name: A Hugging Face folder, a ``.gguf`` file (its weights are de-quantised), or a hub name.
        dtype: Type of every weight.
        trust_remote_code: Whether code in the folder may run.
    Raises: UserError if there is no model of that name, or it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_model_name(name)
    path = Path(name).expanduser()
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if name.endswith(".gguf"):
        if importlib.util.find_spec("gguf") is None:
            raise missing_package("gguf", "a model in GGUF form", "gguf")
        options["gguf_file"], name = path.name, str(path.parent)
    elif path.exists():
        name = str(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        if "gguf_file" not in options:
            options["use_safetensors"] = True  # never a pickle
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    except Exception as error:  # transformers raises many kinds, none of them ours
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{name} cannot be loaded as a causal language model: {reason}") from error
    _forget_quantization(model)
    _check_template_names(name, tokenizer.chat_template)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(
            f"{name}: the tokenizer has {len(tokenizer):,} tokens, the model only "
            f"{model.get_input_embeddings().num_embeddings:,}: they do not belong together"
        )
    return model, tokenizer


def _check_template_names(model: str, templates: Any) -> None:
    """Refuse chat templates whose names would lead out of the folder that they are saved in, before a run and not after."""
    for name in templates if isinstance(templates, dict) else ():
        if not re.fullmatch(r"\w[\w.-]*", str(name)):
            raise UserError(f"{model}: a chat template of the tokenizer is named {str(name)!r}: give it a plain name")


def _forget_quantization(model: Any) -> None:
    """A GGUF model is whole again once loaded, but still marked as one that cannot be saved."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and "gguf" in str(getattr(model.config, "quantization_config", "")).lower():
        model.hf_quantizer = None
        model.is_quantized = False
        del model.config.quantization_config


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """A Hugging Face folder, weights as safetensors, that ``from_pretrained`` loads."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes 0600; a model is for whoever may read its folder


def save_model_config(model: Any, tokenizer: Any, folder: Path) -> None:
    """A Hugging Face folder without its weights."""
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_saved_names(model: Any) -> None:
    """Refuse a model whose weights have other names or shapes in files than in memory, for a caller that cannot convert.

    Raises: UserError naming a weight.
    """
    from transformers.core_model_loading import revert_weight_conversion

    names = {name: torch.empty_like(p, device="meta") for name, p in model.named_parameters()}
    saved = revert_weight_conversion(model, dict(names))
    others = [name for name in names if name not in saved or saved[name].shape != names[name].shape]
    if others:
        raise UserError(
            f"{type(model).__name__} keeps {others[0]} in another form than its files do: train it on one process"
        )


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU, or else the CPU.

    Raises: UserError for a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name}: not to be had on this machine; leave it out, or use device=cpu") from error
    return device
