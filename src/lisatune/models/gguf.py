"""A model as a GGUF file, by llama.cpp's own tools, and what Ollama needs beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from lisatune.errors import UserError
from lisatune.models.export import export_model, refuse_existing, stored_dtype
from lisatune.models.llama_cpp import find_tools
from lisatune.models.modelfile import modelfile


def export_gguf(
    source: str, output: Path, kind: str, *, llama_cpp: Path | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """A GGUF file, by llama.cpp's own converter and, for fewer than 8 bits, its quantiser; and an Ollama Modelfile.

    Args:
        source: The same as for ``export_model``.
        output: The new file. ``NAME.Modelfile`` is written next to ``NAME.gguf``.
        kind: One of ``GGUF_TYPES``, in small or capital letters.
        llama_cpp: A checkout of llama.cpp; the tools on PATH, if not given.
    Raises: UserError if ``output`` is there, a tool is not, or it does not know the model.
    Cost: a copy of the model on the disk; for a quantised type two.
    """
    kind = kind.lower()
    converter, quantiser = find_tools(kind, llama_cpp)
    about = output.with_suffix(".Modelfile")
    refuse_existing(output)
    refuse_existing(about)
    folder, new, plain = (output.with_name(f".{output.name}.{end}") for end in ("model", "new.gguf", "plain.gguf"))
    shutil.rmtree(folder, ignore_errors=True)
    try:
        export_model(source, folder, trust_remote_code=trust_remote_code)
        exact = {"torch.float32": "f32", "torch.float16": "f16"}.get(str(stored_dtype(str(folder))), "bf16")
        words = ["--outtype", exact if quantiser else kind, "--outfile", str(plain), "--model-name", output.stem]
        _run([sys.executable, converter, *words, str(folder)], source, plain, "converter cannot write it as GGUF")
        if quantiser is None:
            plain.replace(new)
        else:
            _run([quantiser, str(plain), str(new), kind.upper()], source, new, f"quantiser cannot make {kind}")
        about.write_text(modelfile(folder, output.name), encoding="utf-8")
        new.replace(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        new.unlink(missing_ok=True)
        plain.unlink(missing_ok=True)
    return {
        "output": str(output), "bytes": output.stat().st_size, "modelfile": str(about), "converter": converter,
        "quantiser": quantiser,
    }  # fmt: skip


def _run(command: list[str], source: str, made: Path, failure: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=os.environ | {"PYTHONUTF8": "1"}
    )
    if done.returncode or not made.exists():
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()] or ["it said nothing"]
        raise UserError(f"{source}: llama.cpp's {failure} ({lines[-1].strip()[:300]})")
