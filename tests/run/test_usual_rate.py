"""A learning rate that nobody gives: it follows the method and the model, and is written down."""

from pathlib import Path

import pytest
import torch
import yaml

from lisatune import UserError
from lisatune.compare.grid import make_grid
from lisatune.settings import build_config
from runs import metrics, run, weights

WIDTH = 32  # of the model in model_folder
SLICES = {"sampled_unit": "slices", "num_active": 1, "interval_steps": 1}
USUAL = {  # settings to the rate, as a multiple of 0.06 / width where it follows the width
    "full": ({"method": "full"}, 0.06 / WIDTH),
    "slices of a model of 4 layers": (SLICES, 0.06 / WIDTH * 2),
    "fifteenths": (SLICES | {"num_slices": 15}, 0.06 / WIDTH * 15),
    "five of fifteen": (SLICES | {"num_slices": 15, "num_active": 5}, 0.06 / WIDTH * 3),
    "spectral slices": (SLICES | {"optim": "spectral"}, 0.08 / WIDTH * 2),
    "layers": ({}, 5e-5),
    "lora": ({"method": "lora"}, 2e-4),
}


@pytest.mark.parametrize(("settings", "rate"), USUAL.values(), ids=USUAL.keys())
def test_it_is_told_and_kept(model_folder, data_file, memory_path, settings, rate):
    if settings.get("method") == "lora":
        pytest.importorskip("peft", reason="the extra 'lora' is not installed")
    own = {"learning_rate": None, "max_steps": 4, "lr_scheduler_type": "constant"} | settings
    _, said = run(model_folder, data_file, memory_path / "run", **own)
    kept = yaml.safe_load((memory_path / "run" / "config.yaml").read_text())["learning_rate"]
    assert kept == float(f"{rate:.2g}")
    assert f"learning_rate={kept:g}, which is usual for this method and model" in said
    assert [line["learning_rate"] for line in metrics(memory_path / "run")[1:5]] == [kept] * 4
    _, said = run(model_folder, data_file, memory_path / "given", **own | {"learning_rate": kept})
    assert "usual" not in said
    a, b = weights(memory_path / "run"), weights(memory_path / "given")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_without_one_resumes_and_another_rate_is_noticed(model_folder, data_file, memory_path):
    own = {"learning_rate": None} | SLICES
    run(model_folder, data_file, memory_path / "straight", **own)
    run(model_folder, data_file, memory_path / "stopped", stop_after=6, **own)
    with pytest.raises(UserError, match=r"learning_rate=0\.001 \(was "):
        run(model_folder, data_file, memory_path / "stopped", resume=True, **own | {"learning_rate": 1e-3})
    run(model_folder, data_file, memory_path / "stopped", resume=True, **own)
    a, b = weights(memory_path / "straight"), weights(memory_path / "stopped")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_comparison_leaves_it_to_each_method():
    asked = {"model": "m", "data": "d", "eval_rows": 8, "method": ["lisa", "full"]}
    trials = make_grid(asked, Path("cmp")).trials
    assert [(trial.config.learning_rate, trial.searched) for trial in trials] == [(None, {})] * 2
    assert build_config({"model": "m", "data": "d", "output": "o", "task": "dpo"}).learning_rate == 1e-6
