"""Servers of other projects that speak OpenAI's protocol, and the command that puts a trained model behind one. Needs no torch."""

from __future__ import annotations

import importlib.util
import ipaddress
import sys
from collections.abc import Callable
from pathlib import Path

from lisatune.common.programs import program
from lisatune.errors import UserError, did_you_mean, missing_package
from lisatune.models.names import ADAPTER, check_model_name, model_of, trusts_code

SERVE_PACKAGES = ("fastapi", "uvicorn", "openai")


def with_transformers(model: str, host: str, port: int, trust_remote_code: bool) -> list[str]:
    """The command of transformers' own server.

    Raises: UserError if it lacks a package, or cannot serve such a model.
    """
    if Path(model).suffix == ".gguf":
        raise UserError(f"{model}: --engine llama.cpp serves a .gguf file; or export it as a folder, and serve that")
    if "@" in model:
        raise UserError(f"{model}: transformers' server reads the text after @ as a revision: give a path without @")
    if absent := [name for name in SERVE_PACKAGES if importlib.util.find_spec(name) is None]:
        raise missing_package(absent[0], "lisatune serve", "serve")
    command = program("transformers")
    start = [command] if command else [sys.executable, "-m", "transformers.cli.transformers"]
    return [
        *start, "serve", model, "--host", host, "--port", str(port), *(["--trust-remote-code"] if trust_remote_code else [])
    ]  # fmt: skip


def with_vllm(model: str, host: str, port: int, trust_remote_code: bool) -> list[str]:
    """The command of vLLM's server.

    Raises: UserError if it is not installed, or cannot serve such a model.
    """
    if Path(model).suffix == ".gguf":
        raise UserError(f"{model}: --engine llama.cpp serves a .gguf file; or export it as a folder, and serve that")
    if (command := program("vllm")) is None:
        raise UserError(
            "--engine vllm: there is no command vllm: install vLLM in an environment of its own (pip install vllm), and put its "
            "bin folder on PATH"
        )
    return [
        command, "serve", model, "--host", host, "--port", str(port), *(["--trust-remote-code"] if trust_remote_code else [])
    ]  # fmt: skip


def with_llama_cpp(model: str, host: str, port: int, trust_remote_code: bool) -> list[str]:
    """The command of llama.cpp's server.

    Raises: UserError if it is not installed, or the model is no .gguf file.
    """
    if Path(model).suffix != ".gguf":
        raise UserError(
            f"--engine llama.cpp serves a .gguf file, and {model} is none: lisatune export {model} model.gguf --gguf f16, then "
            "serve model.gguf"
        )
    if (command := program("llama-server")) is None:
        raise UserError(
            "--engine llama.cpp: there is no command llama-server: install llama.cpp (brew, winget, conda or a release from "
            "github.com/ggml-org/llama.cpp), and put it on PATH"
        )
    return [command, "--model", model, "--host", host, "--port", str(port), "--jinja"]


ENGINES: dict[str, Callable[[str, str, int, bool], list[str]]] = {
    "transformers": with_transformers,
    "vllm": with_vllm,
    "llama.cpp": with_llama_cpp,
}


def served_model(run: str) -> str:
    """The folder or file of ``run`` that a server can load whole.

    Raises: UserError if there is none.
    """
    model = model_of(run)
    folder = Path(model).expanduser()
    whole = f"lisatune export {run} my-model, then serve my-model"
    if (folder / "delta.json").is_file():
        raise UserError(f"{run} holds only the weights that changed: {whole}")
    check_model_name(model)
    if (folder / ADAPTER).is_file():
        raise UserError(f"{run} holds adapters without their base model: {whole}")
    return str(folder) if folder.exists() else model


def serve_command(run: str, engine: str, host: str, port: int, trust_remote_code: bool = False) -> list[str]:
    """The command that serves the model of ``run``; the model's own template and stop tokens hold, as each engine reads them.

    Args:
        run: A run's folder, or whatever ``load_model`` takes.
        engine: One of ``ENGINES``.
        trust_remote_code: Whether code of the model's folder may run; a run's may if it did in training.
    Raises: UserError if the engine is unknown or absent, or cannot serve this model.
    """
    if engine not in ENGINES:
        raise UserError(f"--engine {engine}: choose one of {', '.join(ENGINES)}{did_you_mean(engine, ENGINES)}")
    model = served_model(run)
    return ENGINES[engine](model, host, port, trust_remote_code or trusts_code(run))


def is_open(host: str) -> bool:
    """Whether other machines can reach a server at ``host``.

    Example:
        >>> is_open("127.0.0.1"), is_open("localhost"), is_open("0.0.0.0")
        (False, False, True)
    """
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"
