"""What was trained, for others: a plain Hugging Face folder, or only what changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lisatune.common.files import replace_folder, write_whole
from lisatune.errors import UserError
from lisatune.models.load import load_model, load_trained, save_model, save_model_config
from lisatune.models.names import ADAPTER_WEIGHTS, model_of, trusts_code
from lisatune.settings import read_settings

DELTA, ABOUT = "delta.safetensors", "delta.json"


def export_model(
    source: str, output: Path, dtype: str | None = None, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """The model of a run, of a delta, of a .gguf file or of a folder, as a Hugging Face folder: config, tokenizer, safetensors.

    Such a folder is what transformers, vLLM and llama.cpp's converter read. LoRA's adapters are merged in it. A model card goes
    with it.

    Args:
        source: A run's folder, or whatever ``load_model`` takes.
        output: The new folder.
        dtype: Type of the weights; as they are stored, if not given.
        trust_remote_code: Whether code of the model's folder may run; a run's may if it did in training.
    Raises: UserError if ``output`` is there, or the base of a delta is not what it was.
    Cost: the model in host memory.
    """
    refuse_existing(output)
    model, tokenizer = _load(source, dtype, trust_remote_code)

    def write(new: Path) -> None:
        save_model(model, tokenizer, new)
        _copy_card(source, new)

    _write(output, write)
    weights = _weights(model)
    return {"output": str(output), "tensors": len(weights), "bytes": _num_bytes(weights)}


def export_delta(run: str, output: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Only the weights of ``run`` that are no longer those of the model it began with, to the bit.

    ``output`` holds them whole (``delta.safetensors``), config, tokenizer, and the base's name with a digest of what did
    not change (``delta.json``). ``export_model`` makes the model of it again, where the base can be had.

    Raises: UserError if ``run`` is no run that began with a model, or ``output`` is there.
    Cost: both models in host memory.
    """
    refuse_existing(output)
    base_name = _base_of(run)
    trust_remote_code = trust_remote_code or trusts_code(run)
    trained, tokenizer = _load(run, None, trust_remote_code)
    base, _ = load_model(base_name, next(trained.parameters()).dtype, trust_remote_code=trust_remote_code)
    before, after = _weights(base), _weights(trained)
    if {n: t.shape for n, t in before.items()} != {n: t.shape for n, t in after.items()}:
        raise UserError(
            f"{run} and its base model {base_name} differ in shape: leave --delta out, which exports the whole model"
        )
    changed = {name: weight for name, weight in after.items() if not torch.equal(weight, before[name])}
    kept = {name: weight for name, weight in after.items() if name not in changed}
    about = {
        "base": base_name,
        "dtype": _dtype_name(trained),
        "unchanged_sha256": _digest(kept),
        "changed": sorted(changed),
    }

    def write(new: Path) -> None:
        save_model_config(trained, tokenizer, new)
        save_file(
            {name: weight.contiguous() for name, weight in changed.items()}, new / DELTA, metadata={"format": "pt"}
        )
        (new / DELTA).chmod(0o644)  # safetensors writes 0600
        write_whole(new / ABOUT, json.dumps(about, indent=1) + "\n")
        _copy_card(run, new)

    _write(output, write)
    return {
        "output": str(output), "tensors": len(changed), "of": len(after), "bytes": _num_bytes(changed),
        "of_bytes": _num_bytes(after), "base": base_name,
    }  # fmt: skip


def push(folder: Path, name: str) -> str:
    """Upload ``folder`` to the hub repository ``name``, made private if it is new; returns its address.

    Raises: UserError if the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        hub.create_repo(name, private=True, exist_ok=True)
        return str(hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Trained with lisatune"))
    except Exception as error:  # its errors and those of the connection have no common base
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{name}: the upload to the hub failed ({reason}); log in (hf auth login) and upload {folder}, which is complete"
        ) from error


def _load(source: str, dtype: str | None, trust_remote_code: bool) -> tuple[Any, Any]:
    folder = Path(source).expanduser()
    if (folder / ABOUT).is_file():
        return _apply_delta(folder, dtype, trust_remote_code)
    wanted = getattr(torch, dtype) if dtype else stored_dtype(model_of(source))
    return load_trained(source, wanted, trust_remote_code=trust_remote_code)


def _apply_delta(folder: Path, dtype: str | None, trust_remote_code: bool) -> tuple[Any, Any]:
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        changed = load_file(folder / DELTA)
        base_name, digest, stored = (str(about[key]) for key in ("base", "unchanged_sha256", "dtype"))
        of_delta = getattr(torch, stored)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"{folder}: is not a delta that lisatune export --delta wrote ({error}): export it again"
        ) from error
    model, tokenizer = load_model(base_name, of_delta, trust_remote_code=trust_remote_code)
    if (folder / "chat_template.jinja").is_file():
        tokenizer.chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    _take_generation_settings(model, folder)
    weights = _weights(model)
    if unknown := changed.keys() - weights.keys():
        raise UserError(
            f"{folder}: {base_name} has no weight {min(unknown)}, so the delta was made from another model: put that one back"
        )
    if _digest({name: weight for name, weight in weights.items() if name not in changed}) != digest:
        raise UserError(f"{folder}: {base_name} has changed since the delta was made: put the old model back")
    with torch.no_grad():
        for name, weight in changed.items():
            weights[name].copy_(weight)
    return model.to(getattr(torch, dtype)) if dtype else model, tokenizer


def _copy_card(source: str, new: Path) -> None:
    """Copy the model card of ``source``, if it has one; not through a link, which could lead to any file."""
    card = Path(model_of(source)).expanduser() / "README.md"
    if card.is_file() and not card.is_symlink():
        shutil.copyfile(card, new / "README.md")


def _take_generation_settings(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if path.is_file():
        model.generation_config = GenerationConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))


def _base_of(run: str) -> str:
    settings = Path(run).expanduser() / "config.yaml"
    if not settings.is_file():
        raise UserError(f"{run}: holds no run (no config.yaml), so its base model is not known: leave --delta out")
    return str(read_settings(str(settings), [])["model"])


def stored_dtype(name: str) -> torch.dtype:
    """The type in which the weights of a local folder are stored, adapters too; float32 if that is not said."""
    if (adapters := Path(name).expanduser() / ADAPTER_WEIGHTS).is_file():
        return next(iter(load_file(adapters).values())).dtype
    try:
        config = json.loads((Path(name).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return torch.float32
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _weights(model: Any) -> dict[str, Tensor]:
    """Every weight once, tied ones too, under its first name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _dtype_name(model: Any) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _num_bytes(weights: Mapping[str, Tensor]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights.values())


def _digest(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name].contiguous()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def refuse_existing(output: Path) -> None:
    """Refuse to overwrite ``output``, or to write it where no folder is.

    Raises: UserError.
    """
    if output.exists() or output.is_symlink():
        raise UserError(f"{output} exists already, and nothing is overwritten: choose another name")
    parent = output.absolute().parent
    if not parent.is_dir():
        raise UserError(f"{parent} is not a folder: make it first, or choose another output")


def _write(output: Path, write: Any) -> None:
    new = output.with_name(f".{output.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir()
        write(new)
        replace_folder(new, output)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise UserError(f"{output} cannot be written ({error.strerror or error}): choose another place") from error
