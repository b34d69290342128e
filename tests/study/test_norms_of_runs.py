"""The study of layers as ``train`` and the command line take part in it."""

import json

import pytest
import torch
from typer.testing import CliRunner

from lisatune.cli.app import app
from runs import STEPS, run, weights


@pytest.fixture
def tmp_path(memory_path):
    return memory_path


@pytest.mark.parametrize(
    "more",
    [
        {"norm_steps": 4, "save_steps": 13},
        {"norm_steps": 3, "method": "lora", "save_steps": 13},
        {"norm_steps": 1, "on_bad_step": "skip", "bad_grad_norm": 4.0},
    ],
    ids=["LISA", "LoRA", "bad steps"],
)
def test_recording_changes_no_bit_and_is_resumed_to_the_bit(model_folder, data_file, tmp_path, more):
    if more.get("method") == "lora":
        pytest.importorskip("peft", reason="the extra 'lora' is not installed")
    run(model_folder, data_file, tmp_path / "plain", **{k: v for k, v in more.items() if k != "norm_steps"})
    run(model_folder, data_file, tmp_path / "straight", **more)
    run(model_folder, data_file, tmp_path / "stopped", stop_after=6, **more)
    run(model_folder, data_file, tmp_path / "stopped", stop_after=8, resume=True, **more)
    run(model_folder, data_file, tmp_path / "stopped", resume=True, **more)
    a, b, c = (weights(tmp_path / name) for name in ("plain", "straight", "stopped"))
    assert all(torch.equal(a[n], b[n]) and torch.equal(b[n], c[n]) for n in a)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert (straight / "norms.jsonl").read_bytes() == (stopped / "norms.jsonl").read_bytes()
    told = CliRunner().invoke(app, ["norms", str(straight), str(stopped), "--json"])
    assert json.loads(told.stdout)["runs"][0]["steps"] == STEPS
    if more.get("method") != "lora":
        pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
        assert CliRunner().invoke(app, ["norms", str(straight)]).exit_code == 0
        assert (straight / "norms.html").exists()
