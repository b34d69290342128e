"""``eval_tasks``: scores while a run trains, which change none of its bits."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")

from lisatune import UserError
from lisatune.compare.grid import make_grid, read_grid
from lisatune.run.preflight import preflight
from lisatune.settings import build_config, used_settings
from lisatune.train import train
from places import HELPERS
from runs import metrics, run, weights
from small_tasks import write_tasks
from torchrun import torchrun

NEEDED = {"model": "m", "data": "d", "output": "o"}


@pytest.fixture
def tmp_path(memory_path):
    return memory_path


@pytest.fixture
def tasks(tmp_path):
    (tmp_path / "tasks").mkdir()
    folder = write_tasks(tmp_path / "tasks")
    return {
        "eval_tasks": "winogrande,mmlu_virology",
        "eval_tasks_steps": 4,
        "eval_limit": 3,
        "eval_data_dir": str(folder),
    }


@pytest.mark.parametrize("more", [{}, {"method": "lora", "lora_dropout": 0.2}], ids=["LISA", "LoRA with dropout"])
def test_scoring_changes_no_bit_and_is_resumed_to_the_bit(model_folder, data_file, tmp_path, tasks, more):
    if more:
        pytest.importorskip("peft", reason="the extra 'lora' is not installed")
    some = {"save_steps": 13, "max_steps": 9, **more}
    run(model_folder, data_file, tmp_path / "plain", **some)
    summary, _ = run(model_folder, data_file, tmp_path / "scored", **some, **tasks)
    run(model_folder, data_file, tmp_path / "stopped", stop_after=6, **some, **tasks)
    run(model_folder, data_file, tmp_path / "stopped", resume=True, **some, **tasks)
    a, b, c = (weights(tmp_path / name) for name in ("plain", "scored", "stopped"))
    assert all(torch.equal(a[name], b[name]) and torch.equal(b[name], c[name]) for name in a)
    rows = metrics(tmp_path / "scored")
    assert rows == metrics(tmp_path / "stopped")
    assert [row["step"] for row in rows if "scores" in row] == [0, 4, 8, 9]
    plain = metrics(tmp_path / "plain")
    assert [row | {"scores": 0, "plan": 0} for row in rows] == [row | {"scores": 0, "plan": 0} for row in plain]
    assert set(summary["scores"]) == {"winogrande", "mmlu_virology"}
    assert rows[-1]["scores"] == summary["scores"]
    assert json.loads((tmp_path / "stopped" / "summary.json").read_text())["scores"] == summary["scores"]


def test_two_processes_score_as_one_does(model_folder, data_file, tmp_path, tasks):
    """Both come to each score, and what is told is told once."""
    some = tasks | {
        "model": str(model_folder), "data": str(data_file), "max_steps": 4, "learning_rate": 1e-2, "adam_epsilon": 1e-3,
        "max_length": 64, "eval_rows": 7, "per_device_train_batch_size": 2,
    }  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    train(build_config(some | {"output": str(one), "gradient_accumulation_steps": 2}))
    cases = tmp_path / "cases.json"
    cases.write_text(json.dumps([some | {"output": str(two)}]))
    torchrun(2, HELPERS / "torchrun.py", cases)
    scores = [{row["step"]: row["scores"] for row in metrics(folder) if "scores" in row} for folder in (one, two)]
    assert list(scores[1]) == [0, 4]
    assert scores[0] == scores[1]


def test_the_best_is_by_the_mean_score_where_there_are_tasks(model_folder, data_file, tmp_path, tasks, monkeypatch):
    some = tasks | {"eval_tasks_steps": 1, "eval_limit": 5, "learning_rate": 0.1, "keep_best": True, "max_steps": 6}
    summary, _ = run(model_folder, data_file, tmp_path / "run", **some)
    scores = {row["step"]: row["scores"] for row in metrics(tmp_path / "run")[1:]}
    means = {step: sum(of.values()) for step, of in scores.items()}
    assert summary["best_step"] == max(means, key=means.__getitem__)
    assert summary["scores"] == scores[summary["best_step"]]

    monkeypatch.setattr("lm_eval.api.task.ConfigurableTask.higher_is_better", lambda self: {"word_perplexity": False})
    with pytest.raises(UserError, match="eval_tasks names winogrande, whose score is better when lower"):
        run(model_folder, data_file, tmp_path / "other", **some)


def test_trackers_have_a_number_for_each_task(model_folder, data_file, tmp_path, tasks):
    pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(model_folder, data_file, tmp_path / "run", max_steps=1, report_to="tensorboard", **tasks)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("scores/winogrande")] == [0, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_tasks_steps": 5}, "eval_tasks_steps has no effect without eval_tasks"),
        ({"eval_data_dir": "x"}, "eval_data_dir has no effect without eval_tasks"),
        (
            {"eval_tasks": "mmlu", "offload_frozen": True, "gradient_checkpointing": True, "device": "cuda"},
            "cannot go with",
        ),
        (
            {"eval_tasks": "mmlu", "eval_tasks_steps": 0},
            "eval_tasks_steps=0: input should be greater than or equal to 1",
        ),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        build_config(NEEDED | settings)


def test_settings_that_play_no_part_are_not_written():
    assert "eval_limit" not in used_settings(build_config(NEEDED))
    assert used_settings(build_config(NEEDED | {"eval_tasks": "mmlu"}))["eval_limit"] == 32


def test_a_run_is_refused_before_it_begins(model_folder, data_file, tmp_path, tasks):
    given = {"model": str(model_folder), "data": str(data_file), "output": str(tmp_path / "run")}
    for wrong, message in (
        ({"eval_tasks": ["winogrande", "mmlu_virologi"]}, "task 'mmlu_virologi'.*did you mean 'mmlu_virology'"),
        ({"eval_data_dir": str(tmp_path)}, "holds none of the folders"),
        ({"eval_tasks": ","}, "no task is named"),
    ):
        with pytest.raises(UserError, match=message):
            preflight(build_config(given | tasks | wrong))
    assert not (tmp_path / "run").exists()


def test_several_tasks_are_one_value_of_a_comparison():
    given = read_grid(None, ["model=m", "data=d", "eval_rows=6", "eval_tasks=gsm8k,mmlu", "method=lisa,full"])
    assert [trial.config.eval_tasks for trial in make_grid(given, Path("cmp")).trials] == [["gsm8k", "mmlu"]] * 2
    for word in ("eval_tasks=[gsm8k],[mmlu]", "eval_tasks_steps=1,2", "eval_limit=1,2"):
        several = read_grid(None, ["model=m", "data=d", "eval_rows=6", "eval_tasks=gsm8k", word])
        with pytest.raises(UserError, match="has several values"):
            make_grid(several, Path("cmp"))
