"""`lisatune export`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from lisatune.cli.common import OUTPUT, AsJson, TrustRemoteCode, console, heavy_imports
from lisatune.common.console import tell

FORM = "Form"


def export(
    run: Annotated[str, typer.Argument(help="Folder of a run, a delta or a model, or a .gguf file.")],
    output: Annotated[Path, typer.Argument(help="The new folder, or the new file with --gguf.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16. Default: as it is stored.", rich_help_panel=FORM),
    ] = None,
    delta: Annotated[
        bool,
        typer.Option(
            "--delta",
            help="Only the weights that the run has changed. To get the model back, export this folder.",
            rich_help_panel=FORM,
        ),
    ] = False,
    gguf: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="A file for llama.cpp and Ollama: f32, f16, bf16, q8_0, or a quantised type such as q4_k_m.",
            rich_help_panel=FORM,
        ),
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            envvar="LLAMA_CPP",
            help="Checkout of llama.cpp, whose tools write GGUF. Default: those on PATH.",
            rich_help_panel=FORM,
        ),
    ] = None,
    push_to: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME", help="Upload the folder to this hub repository too.", rich_help_panel=OUTPUT
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write a trained model as a plain folder, as a GGUF file, or as the weights that changed.

    Nothing is overwritten. LoRA's adapters are merged.

    Example:
        lisatune export runs/a my-model --dtype bfloat16
        lisatune export runs/a my-model.gguf --gguf q4_k_m --llama-cpp llama.cpp
    """
    from lisatune.common.amounts import gib
    from lisatune.models.export_check import check_export

    check_export(run, dtype=dtype, delta=delta, gguf=gguf, llama_cpp=llama_cpp, push_to=push_to)
    with heavy_imports():
        from lisatune.models.export import export_delta, export_model, push
        from lisatune.models.gguf import export_gguf

    if delta:
        result = export_delta(run, output, trust_remote_code=trust_remote_code)
    elif gguf is not None:
        result = export_gguf(run, output, gguf, llama_cpp=llama_cpp, trust_remote_code=trust_remote_code)
    else:
        result = export_model(run, output, dtype, trust_remote_code=trust_remote_code)
    if push_to is not None:
        result["pushed"] = push(output, push_to)
    if as_json:
        print(json.dumps(result))
        return
    share = f", {result['tensors']} of {result['of']} tensors, of {gib(result['of_bytes'])}" if delta else ""
    tell(console, f"{output}: {gib(result['bytes'])}{share}")
    if gguf is not None:
        tools = [result["converter"], result["quantiser"]]
        tell(console, f"written by llama.cpp: {', '.join(tool for tool in tools if tool)}")
        tell(console, f"for Ollama: ollama create NAME -f {shlex.quote(result['modelfile'])}")
