"""`lisatune serve`."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from typing import Annotated

import typer

from lisatune.cli.common import TrustRemoteCode, console
from lisatune.common.console import tell, warn

SERVER = "Server"


def serve(
    run: Annotated[str, typer.Argument(help="A run's folder, a model's folder, a .gguf file, or a hub name.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTION...]", help="More options, for the server itself.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="transformers, vllm or llama.cpp.", rich_help_panel=SERVER)
    ] = "transformers",
    host: Annotated[str, typer.Option(help="Where to listen.", rich_help_panel=SERVER)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.", rich_help_panel=SERVER)] = 8000,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve a trained model over OpenAI's protocol.

    The server is transformers' own, vLLM's or llama.cpp's. Its command is printed, and runs until Ctrl-C.

    Example:
        lisatune serve runs/a
        lisatune serve model.gguf --engine llama.cpp -- --ctx-size 4096
    """
    from lisatune.models.serve import is_open, serve_command, served_model

    command = [*serve_command(run, engine, host, port, trust_remote_code), *(options or [])]
    tell(console, shlex.join(command))
    tell(console, f"address: http://{f'[{host}]' if ':' in host else host}:{port}/v1, model: {served_model(run)}")
    if is_open(host):
        key = "its server knows no key" if engine == "transformers" else "add -- --api-key KEY for a key"
        warn(console, f"everyone who can reach port {port} can use this model: {key}")
    start(command)


def start(command: list[str]) -> None:
    """Become ``command``, so that signals reach it; on Windows, which cannot, start it and wait."""
    sys.stderr.flush()
    if os.name == "posix":
        os.execv(command[0], command)
    try:
        sys.exit(subprocess.call(command))
    except KeyboardInterrupt:
        sys.exit(130)
