"""Models and tokenizers, from a folder, a GGUF file or the hub, and back to a folder."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lisatune.errors import UserError, missing_package
from lisatune.models.names import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    base_of_adapters,
    check_model_name,
    check_not_quantised,
    check_writes_text,
    model_of,
    read_config,
    trusts_code,
)  # fmt: skip


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> tuple[Any, int | None]:
    """A model's tokenizer, without its weights, and the rows of its embedding where config.json tells them.

    Raises: UserError if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        options["gguf_file"], folder = path.name, str(path.parent)
    else:
        folder = str(path) if path.exists() else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # transformers raises many kinds, none of them ours
        raise UserError(
            f"{name}: its tokenizer cannot be loaded, so put its files into that folder: {' '.join(str(error).split())[:300]}"
        ) from error
    found = None if "gguf_file" in options else read_config(name)
    size = found[1].get("vocab_size") if found else None
    return tokenizer, size if isinstance(size, int) else None


def load_model(
    name: str, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False,
    auto_class: str = "AutoModelForCausalLM", as_stored: bool = False, **more: Any,
) -> tuple[torch.nn.Module, Any]:  # fmt: skip
    """A causal language model, trainable as its authors built it, in evaluation mode, and its tokenizer, on the CPU.

    Args:
        name: A Hugging Face folder, a ``.gguf`` file (its weights are de-quantised), or a hub name. Of a folder with peft's
            adapters: their base model, with the adapters merged in.
        dtype: Type of every weight.
        trust_remote_code: Whether code in the folder may run.
        auto_class: The class of transformers that loads it, where another head is wanted.
        as_stored: Leave weights in the type of their files, where that makes no difference but memory. They are then pages of
            these files, which the system reads when they are needed and may drop. Whoever places them converts them.
        more: What that class is given.
    Raises: UserError if there is no model of that name, or it cannot be loaded.
    """
    import transformers
    from transformers import AutoTokenizer

    check_model_name(name)
    path = Path(name).expanduser()
    if (path / ADAPTER).is_file():
        return _load_adapted(path, dtype, trust_remote_code)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if name.endswith(".gguf"):
        if importlib.util.find_spec("gguf") is None:
            raise missing_package("gguf", "a model in GGUF form", "gguf")
        options["gguf_file"], name = path.name, str(path.parent)
    elif path.exists():
        name = str(path)
    if "gguf_file" not in options:
        found = _config_dict(name)
        check_not_quantised(name, found)
        if auto_class == "AutoModelForCausalLM":
            check_writes_text(name, found)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        if "gguf_file" not in options:
            options["use_safetensors"] = True  # never a pickle
        load = partial(getattr(transformers, auto_class).from_pretrained, name, **options, **more)
        stored = _stored_type(path) if as_stored and "gguf_file" not in options else None
        model = load(dtype=stored or dtype)
        if stored is not None:
            model = load(dtype=dtype) if _wants_other_types(model) else model
            model.config.dtype = dtype
    except Exception as error:  # transformers raises many kinds, none of them ours
        reason = " ".join(str(error).split())[:300]
        kind = "a causal language model" if auto_class == "AutoModelForCausalLM" else "a reward model"
        where = "" if path.exists() else "no such folder here, and from the hub it "
        raise UserError(f"{name}: {where}cannot be loaded as {kind}: {reason}") from error
    _forget_quantization(model)
    _check_template_names(name, tokenizer.chat_template)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.vocab_size > model.get_input_embeddings().num_embeddings:  # tokens added to it may not occur
        raise UserError(
            f"{name}: the tokenizer has {tokenizer.vocab_size:,} tokens, but the model only "
            f"{model.get_input_embeddings().num_embeddings:,}: give a model with its own tokenizer"
        )
    return model, tokenizer


def _stored_type(folder: Path) -> torch.dtype | None:
    """The floating type of all tensors in a folder's safetensors; None if there are several, or no such files."""
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    types = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            types |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a dict
    return names.get(*types) if len(types) == 1 else None


def _wants_other_types(model: Any) -> bool:
    """Whether a model's class keeps some weights in float32, or has buffers among its weights, which are not converted later."""
    kept = model.state_dict().keys()
    buffers = any(name in kept and buffer.is_floating_point() for name, buffer in model.named_buffers())
    return buffers or any(getattr(model, f"_keep_in_fp32_modules{end}", None) for end in ("", "_strict"))


def _config_dict(name: str) -> dict[str, Any]:
    """What config.json says; nothing if it is not to be had, which loading will tell."""
    from transformers import PretrainedConfig

    try:
        return dict(PretrainedConfig.get_config_dict(name)[0])
    except Exception:  # transformers raises many kinds, none of them ours
        return {}


def load_trained(run: str, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """``load_model`` for a run's folder or any model; code of its own may run if it did when the run was trained."""
    return load_model(model_of(run), dtype, trust_remote_code=trust_remote_code or trusts_code(run))


def _load_adapted(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> tuple[torch.nn.Module, Any]:
    """The base model of the adapters in ``folder``, with these merged in, and the tokenizer that was saved with them."""
    try:
        from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    except ImportError as error:
        raise missing_package("peft", f"{folder}, which holds adapters,", "lora") from error
    from transformers import AutoTokenizer, GenerationConfig

    base = base_of_adapters(folder)
    model, tokenizer = load_model(base, dtype, trust_remote_code=trust_remote_code)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a name of its past
            settings = PeftConfig.from_peft_type(**json.loads((folder / ADAPTER).read_text(encoding="utf-8")))
            adapted = get_peft_model(model, settings, autocast_adapter_dtype=False)
            told = set_peft_model_state_dict(adapted, load_file(folder / ADAPTER_WEIGHTS))
        if told.unexpected_keys:
            raise UserError(f"it has no weight {told.unexpected_keys[0]}")
        model = adapted.to(dtype).merge_and_unload()
        if (folder / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if (folder / "generation_config.json").is_file():
            generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
            model.generation_config = GenerationConfig.from_dict(generation)
    except Exception as error:  # peft and transformers raise many kinds, none of them ours
        raise UserError(
            f"{folder}: its adapters do not fit {base}, so correct base_model_name_or_path in its adapter_config.json: {' '.join(str(error).split())[:300]}"
        ) from error
    return model.eval(), tokenizer


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those of the model's generation settings."""
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return sorted({token for token in (*listed, tokenizer.eos_token_id) if token is not None})


def stop_at(model: Any, tokens: Sequence[int]) -> None:
    """Make generation end at ``tokens`` too. They are saved in ``generation_config.json``."""
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    own = settings.eos_token_id
    listed = own if isinstance(own, list) else [own] if own is not None else []
    ends = [*listed, *(token for token in tokens if token not in listed)]
    if ends != listed:
        settings.eos_token_id = ends if len(ends) > 1 else ends[0]


def check_positions(model: Any, longest: int) -> None:
    """Refuse rows longer than a model's table of positions, before they fail in it.

    Raises: UserError naming both.
    """
    if longest > (limit := learned_positions(model)):
        raise UserError(
            f"the longest row has {longest:,} tokens, but the model's context is {limit:,} tokens: set "
            f"max_length={limit}"
        )


def learned_positions(model: Any) -> float:
    """The size of a model's table of positions; infinite if it has none."""
    config, limits = model.config.get_text_config(), [math.inf]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and (name.endswith("wpe") or "position" in name.rpartition(".")[2]):
            limits += [getattr(config, "max_position_embeddings", None) or module.num_embeddings, module.num_embeddings]
    return min(limits)


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


def in_files(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``tensors`` of ``model``, by their names in memory, as its files have them: mixtures store each expert by itself."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))


def is_stored_as_held(model: Any, parts: Mapping[str, Mapping[str, torch.Tensor]]) -> bool:
    """Whether the weights of ``model`` have the same names and shapes in its files as in memory.

    Args:
        parts: All its weights, in parts that are to be converted one at a time.
    Raises: UserError naming a weight that is made from several parts, so that no part can be converted by itself.
    """
    held = {n: torch.empty_like(p, device="meta") for every in parts.values() for n, p in every.items()}
    stored = {n: p.shape for n, p in in_files(model, held).items()}
    if stored == {n: p.shape for n, p in held.items()}:
        return True
    by_parts = [in_files(model, {n: held[n] for n in every}) for every in parts.values()]
    other = {n: p.shape for made in by_parts for n, p in made.items()}.items() ^ stored.items()
    if other:
        raise UserError(
            f"{type(model).__name__} has {min(other)[0]} in its files, which belongs to several layers: leave dp_shard_size out"
        )
    return False


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU, or else Apple's (MPS), or else the CPU.

    Raises: UserError for a device that is not there.
    """
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device("cuda" if torch.cuda.is_available() else mps)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name}: not available on this machine; leave it out, or use device=cpu") from error
    return device
