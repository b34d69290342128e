"""What an export needs, checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from lisatune.errors import UserError
from lisatune.models.llama_cpp import find_tools
from lisatune.models.names import check_model_name, model_of


def check_export(
    run: str, *, dtype: str | None, delta: bool, gguf: str | None, llama_cpp: Path | None, push_to: str | None
) -> None:
    """Refuse what cannot be exported, or not like that."""
    folder = Path(run).expanduser()
    if not (folder / "delta.json").is_file():
        check_model_name(model_of(run))
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {dtype}: choose float32, bfloat16 or float16")
    if delta and gguf is not None:
        raise UserError("--delta and --gguf cannot go together: a GGUF file is a whole model")
    if dtype is not None and (delta or gguf is not None):
        raise UserError(
            "--dtype has an effect on a plain folder only: leave it out; a delta keeps the run's type, and --gguf names one"
        )
    if push_to is not None and gguf is not None:
        raise UserError("--push-to uploads a folder: leave out --gguf")
    if gguf is not None:
        find_tools(gguf.lower(), llama_cpp)
