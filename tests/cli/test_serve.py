"""`lisatune serve`: the command of each engine, and a real answer over HTTP."""

import os
import shutil
import socket
import sys
import urllib.error
import urllib.request

import pytest

from lisatune import UserError
from lisatune.models.export import export_delta
from lisatune.models.serve import serve_command
from lisatune.settings import build_config
from lisatune.train import train
from patience import started, wait_until


@pytest.fixture(scope="module")
def run(model_folder, tmp_path_factory):
    """It has learned one answer by heart, and where it ends."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "rows.jsonl").write_text('{"prompt": "What is 1 plus 1?", "completion": "It is 2."}\n' * 4)
    settings = {"method": "full", "max_steps": 40, "learning_rate": 1e-2, "max_length": 64}
    places = {"model": str(model_folder), "data": str(folder / "rows.jsonl"), "output": str(folder / "run")}
    train(build_config(places | settings))
    return folder / "run"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Commands of these names are on PATH."""

    def install(*names):
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in names:
            shutil.copy(sys.executable, folder / name)
        monkeypatch.setenv("PATH", str(folder))
        return folder

    return install


def test_the_commands_of_vllm_and_llama_cpp(run, installed, tmp_path):
    folder, model = installed("vllm", "llama-server"), str(run / "model")
    assert serve_command(str(run), "vllm", "127.0.0.1", 81, True) == [
        str(folder / "vllm"), "serve", model, "--host", "127.0.0.1", "--port", "81", "--trust-remote-code"
    ]  # fmt: skip
    file = tmp_path / "model.gguf"
    file.touch()
    assert serve_command(str(file), "llama.cpp", "127.0.0.1", 82) == [
        str(folder / "llama-server"), "--model", str(file), "--host", "127.0.0.1", "--port", "82", "--jinja"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "engine", "said"),
    [
        ("run", "vlm", "choose one of transformers, vllm, llama.cpp; did you mean 'vllm'?"),
        ("run", "vllm", "pip install vllm"),
        ("run", "llama.cpp", "--gguf f16"),
        ("model.gguf", "llama.cpp", "no command llama-server"),
        ("model.gguf", "transformers", "--engine llama.cpp serves a .gguf file"),
        ("delta", "transformers", "only the weights that changed: lisatune export"),
        ("adapters", "transformers", "adapters without their base model: lisatune export"),
        ("me@home/model", "transformers", "reads the text after @ as a revision"),
        ("./nothing", "transformers", "no such model folder"),
    ],
)
def test_refusals(run, model_folder, installed, tmp_path, name, engine, said):
    installed()
    (tmp_path / "model.gguf").touch()
    if name == "delta":
        export_delta(str(run), tmp_path / "delta")
    if name == "adapters":
        (tmp_path / "adapters").mkdir()
        about = f'{{"peft_type": "LORA", "base_model_name_or_path": "{model_folder.as_posix()}"}}'
        (tmp_path / "adapters" / "adapter_config.json").write_text(about)
        (tmp_path / "adapters" / "adapter_model.safetensors").touch()
    source = {"run": str(run)}.get(name, name if "/" in name else str(tmp_path / name))
    with pytest.raises(UserError, match=said.replace("?", "[?]")):
        serve_command(source, engine, "127.0.0.1", 8000)


def test_a_server_whose_packages_are_missing_names_the_extra(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"fastapi: pip install 'lisatune\[serve\]'"):
        serve_command(str(run), "transformers", "127.0.0.1", 8000)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def is_healthy(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


@pytest.mark.slow
def test_an_openai_client_gets_the_trained_answer(run):
    for name in ("openai", "fastapi", "uvicorn"):
        pytest.importorskip(name, reason="the extra 'serve' is not installed")
    import openai

    port, model = free_port(), str(run / "model")
    words = [sys.executable, "-m", "lisatune", "serve", run, "--port", port]
    with started(words, env=os.environ | {"HF_HUB_OFFLINE": "1"}) as server:
        wait_until(lambda: is_healthy(port), server, pause=0.2)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            asked = {"model": model, "messages": [{"role": "user", "content": "What is 1 plus 1?"}], "temperature": 0}
            (choice,) = client.chat.completions.create(**asked).choices
            parts = [
                part.choices[0].delta.content or "" for part in client.chat.completions.create(**asked, stream=True)
            ]
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(**asked | {"model": "another/model"})
    assert (choice.message.content, choice.finish_reason) == ("It is 2.", "stop")
    assert "".join(parts) == "It is 2."
