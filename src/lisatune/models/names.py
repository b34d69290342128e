"""Names of models, checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from lisatune.errors import UserError, did_you_mean


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
        raise UserError(f"{name}: a model is a Hugging Face folder, a .gguf file or a hub name, not such a file")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf"):
        nearby = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{name}: no such model folder or file{did_you_mean(path.name, nearby)}")
