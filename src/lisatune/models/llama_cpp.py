"""llama.cpp's own tools, which write GGUF files: where they are, and the types that they write. Needs no torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from lisatune.common.programs import program
from lisatune.errors import UserError

CONVERTED = ("f32", "f16", "bf16", "q8_0")  # types that llama.cpp's converter writes
QUANTISED = ("q3_k_m", "q4_0", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")  # and those that llama-quantize makes
GGUF_TYPES = (*CONVERTED, *QUANTISED)
CONVERTER, QUANTISER = "convert_hf_to_gguf.py", "llama-quantize"
HOW = "git clone --depth 1 https://github.com/ggml-org/llama.cpp, then --llama-cpp llama.cpp"


def find_tools(kind: str, llama_cpp: Path | None) -> tuple[str, str | None]:
    """The converter, and for a quantised ``kind`` the quantiser: in the folder ``llama_cpp``, or else on PATH.

    Raises: UserError if one is absent, or there is no such type.
    """
    if kind not in GGUF_TYPES:
        raise UserError(f"--gguf {kind}: choose one of {', '.join(GGUF_TYPES)}")
    if llama_cpp is not None and not (llama_cpp / CONVERTER).is_file():
        raise UserError(f"--llama-cpp {llama_cpp}: the folder has no {CONVERTER}: give a checkout of llama.cpp ({HOW})")
    converter = shutil.which(CONVERTER) if llama_cpp is None else str(llama_cpp / CONVERTER)
    if converter is None:
        raise UserError(f"--gguf runs llama.cpp's {CONVERTER}, which is not on PATH: {HOW}")
    if kind in CONVERTED:
        return converter, None
    quantiser = (program(QUANTISER, llama_cpp) if llama_cpp else None) or program(QUANTISER)
    if quantiser is None:
        raise UserError(
            f"--gguf {kind} runs llama.cpp's {QUANTISER}, which is neither built in --llama-cpp nor on PATH: install llama.cpp, "
            f"or choose one of {', '.join(CONVERTED)}"
        )
    return converter, quantiser
