"""`lisatune export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lisatune.cli.common import AsJson, TrustRemoteCode, console, quiet_libraries
from lisatune.common.console import tell


def export(
    run: Annotated[str, typer.Argument(help="A run's folder, a delta's, a model's, or a .gguf file.")],
    output: Annotated[Path, typer.Argument(help="The new folder, or the new file with --gguf.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as it is stored by default.")] = None,
    delta: Annotated[
        bool,
        typer.Option("--delta", help="Only the weights that the run has changed; export makes a model of them again."),
    ] = False,
    gguf: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="For llama.cpp: f32, f16, bf16 or q8_0. Needs 'lisatune\\[export]'."),
    ] = None,
    push_to: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload the folder to this hub repository too.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Hand on what was trained: a plain folder, only what changed, or a GGUF file."""
    from lisatune.common.amounts import gib
    from lisatune.models.export_check import check_export

    check_export(run, dtype=dtype, delta=delta, gguf=gguf, push_to=push_to)
    quiet_libraries()
    from lisatune.models.export import export_delta, export_gguf, export_model, push

    if delta:
        result = export_delta(run, output, trust_remote_code=trust_remote_code)
    elif gguf is not None:
        result = export_gguf(run, output, gguf, trust_remote_code=trust_remote_code)
    else:
        result = export_model(run, output, dtype, trust_remote_code=trust_remote_code)
    if push_to is not None:
        result["pushed"] = push(output, push_to)
    if as_json:
        print(json.dumps(result))
        return
    share = f", {result['tensors']} of {result['of']} tensors, of {gib(result['of_bytes'])}" if delta else ""
    tell(console, f"{output}: {gib(result['bytes'])}{share}")
