"""Names of models, checked before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lisatune.errors import UserError, did_you_mean, shown
from lisatune.settings import read_settings

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # the files of a folder that peft writes


def model_of(run: str) -> str:
    """The model's folder in a run's folder, that of its adapters if it saved nothing else; or ``run`` itself."""
    path = Path(run).expanduser()
    if (path / "model" / "config.json").is_file():
        return str(path / "model")
    return str(path / "adapter") if (path / "adapter" / ADAPTER).is_file() else run


def base_of_adapters(folder: Path) -> str:
    """The model that LoRA's adapters in ``folder`` belong to.

    Raises: UserError if that is not said, or they are others.
    """
    try:
        settings = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        if settings["peft_type"] != "LORA":
            raise UserError(
                f"{folder / ADAPTER} is of {shown(settings['peft_type'])}: only LoRA's adapters can be merged; give a merged model"
            )
        return str(settings["base_model_name_or_path"])
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{folder / ADAPTER} does not say what model the adapters belong to ({error}); set base_model_name_or_path"
        ) from error


def check_model_name(name: str) -> None:
    """Refuse a path at which no model lies, or one of pickled weights; costs a look at the folder. Hub names pass."""
    try:
        _check_model_name(name)
    except (OSError, RuntimeError) as error:  # a name too long, a folder that may not be read, ~ of an unknown user
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name}: cannot be looked up ({reason}); give the path of a model's folder") from error


def _check_model_name(name: str) -> None:
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return
    if path.is_dir():
        if (path / ADAPTER).is_file():
            if not (path / ADAPTER_WEIGHTS).is_file():
                raise UserError(f"{name}: the folder holds no {ADAPTER_WEIGHTS}: save the adapters as safetensors")
            _check_model_name(base_of_adapters(path))
            return
        if not (path / "config.json").is_file():
            inner = path / "model" / "config.json"
            hint = f"; did you mean {path / 'model'}?" if inner.is_file() else ": give one saved by save_pretrained"
            raise UserError(f"{name}: the folder holds no config.json, so it is no Hugging Face model{hint}")
        if any(path.glob("*.bin")) and not any(path.glob("*.safetensors")):
            raise UserError(
                f"{name}: the weights are pickled (.bin), and unpickling can run code: save them as safetensors first, with "
                "save_pretrained"
            )
        return
    if path.is_file():
        raise UserError(f"{name}: not a model: give a Hugging Face folder, a .gguf file or a hub name")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf"):
        nearby = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{name}: no such model folder or file{did_you_mean(path.name, nearby)}")


# model types whose positions are a table that the model has learned, or of a fixed size; those with n_positions are too, and MPT
TABLE_OF_POSITIONS = (
    "opt",
    "gpt_neo",
    "biogpt",
    "bert",
    "roberta",
    "xlm-roberta",
    "bart",
    "mbart",
    "pegasus",
    "marian",
)


def read_config(name: str) -> tuple[Path, dict[str, Any]] | None:
    """A local model's ``config.json`` and what it holds, that of the text model first; None for other models.

    Raises: UserError if it cannot be read.
    """
    file = Path(name).expanduser() / "config.json"
    if not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        return file, {**settings, **settings.get("text_config", {})}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file} is not the config.json of a model ({error}); save the model again with save_pretrained"
        ) from error


# where weights are said to be quantised: by transformers, by its earlier versions, and by MLX; or in a file of its own
QUANTISED_KEYS = ("quantization_config", "compression_config", "quantization")
QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


def check_not_quantised(name: str, settings: dict[str, Any]) -> None:
    """Refuse weights that are quantised: they cannot be trained, and what would be saved is not what was loaded.

    Raises: UserError saying how they are quantised.
    """
    inner = [value for key, value in settings.items() if key.endswith("_config") and isinstance(value, dict)]
    found = [(key, one[key]) for one in (settings, *inner) for key in QUANTISED_KEYS if one.get(key)]
    if found:
        says = f"config.json says {found[0][0]}: {_how_quantised(found[0][1])}"
    elif file := next((file for file in QUANTISED_FILES if (Path(name) / file).is_file()), None):
        says = f"the folder has a {file}"
    else:
        return
    raise UserError(
        f"{name}: its weights are quantised ({says}), so they cannot be trained: give the model in bfloat16 or float32, before "
        "quantisation"
    )


def _how_quantised(how: Any) -> str:
    told = how if isinstance(how, dict) else {}
    bits = 8 if told.get("load_in_8bit") else 4 if told.get("load_in_4bit") else told.get("bits", "")
    ours = "bitsandbytes" if told.keys() & {"load_in_8bit", "load_in_4bit"} else "unknown"
    return str(told.get("quant_method", ours)) + (
        f", {bits} bits" if isinstance(bits, int) else f", {bits}" if bits else ""
    )


def check_writes_text(name: str, settings: dict[str, Any]) -> None:
    """Refuse a model that has another head than one for text: transformers would put a random one in its place.

    Raises: UserError naming the class.
    """
    classes = [str(one) for one in settings.get("architectures") or ()]
    if other := next((one for one in classes if one.endswith(("Classification", "Answering"))), None):
        raise UserError(
            f"{name} is a {other}, which does not generate text: give the causal language model that it was made from, or train it with "
            "task=reward"
        )


def check_max_length(name: str, max_length: int) -> None:
    """Refuse rows longer than the positions that a local model has learned; others are checked when loaded.

    Raises: UserError naming both.
    """
    if (found := read_config(name)) is None:
        return
    file, settings = found
    positions = settings.get("n_positions")
    key = "n_positions"
    if positions is None and settings.get("model_type") in TABLE_OF_POSITIONS:
        positions, key = settings.get("max_position_embeddings"), "max_position_embeddings"
    if positions is None and settings.get("model_type") == "mpt":
        positions, key = settings.get("max_seq_len"), "max_seq_len"
    if isinstance(positions, int) and max_length > positions:
        raise UserError(
            f"max_length={max_length} is more than the model's context of {positions} tokens ({key} in {file}): set "
            f"max_length={positions}"
        )


def trusts_code(name: str) -> bool:
    """Whether ``name`` is a run's folder, or the model in it, that was trained with trust_remote_code=true."""
    path = Path(name).expanduser()
    folder = path.parent if path.name in ("model", "adapter") else path
    if not (folder / "config.yaml").is_file():
        return False
    return read_settings(str(folder / "config.yaml"), []).get("trust_remote_code") is True
