"""``early_stopping`` and ``keep_best``: exact, also where a run is stopped, killed and resumed in between."""

import json
import math
import shutil

import pytest
import torch

from lisatune import UserError
from lisatune.run.progress import Evaluation, Progress
from lisatune.settings import build_config
from runs import STEPS, manifest, metrics, run, weights

# so large a rate that the loss goes up and down
WANDERING = {"learning_rate": 0.5, "lr_scheduler_type": "constant", "eval_steps": 1, "eval_rows": 12}
KINDS = {
    "layers": {"num_active": 1, "interval_steps": 2},
    "slices": {
        "method": None,
        "sampled_unit": "slices",
        "slices_of": "rows",
        "num_slices": 3,
        "num_active": 1,
        "interval_steps": 1,
    },
    "lora": {"method": "lora", "learning_rate": 1.0},
}


@pytest.fixture
def tmp_path(memory_path):
    return memory_path


def losses(folder):
    """Step to held-out loss, after the first step."""
    return {row["step"]: row["eval_loss"] for row in metrics(folder)[1:] if "eval_loss" in row}


def equal(one, other):
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_model_is_the_best_and_a_resumed_run_finds_the_same(model_folder, data_file, tmp_path, kind):
    """It is what a run of so many steps leaves. Stopped after the best, its bits are the same."""
    if kind == "lora":
        pytest.importorskip("peft", reason="the extra 'lora' is not installed")
    some = WANDERING | KINDS[kind]
    summary, said = run(model_folder, data_file, tmp_path / "kept", keep_best=True, **some)
    found = losses(tmp_path / "kept")
    best = min(found, key=found.__getitem__)
    assert 2 < best < STEPS - 1, "neither the first nor the last, or this test shows nothing"
    assert (summary["best_step"], summary["steps"]) == (best, STEPS)
    assert summary["eval_loss_after"] == found[best] < found[STEPS]
    assert f"the trained model is that of step {best}" in said
    run(model_folder, data_file, tmp_path / "short", max_steps=best, **some)
    assert equal(tmp_path / "kept", tmp_path / "short")

    # the last state, and the best, are in checkpoints
    names = {path.name for path in (tmp_path / "kept" / "checkpoints").iterdir()}
    assert {f"checkpoint-{best}", f"checkpoint-{STEPS}"} <= names

    # stopped after the best; what is saved and put back is the same for all kinds
    if kind != "layers":
        return
    settings = some | {"keep_best": True}
    run(model_folder, data_file, tmp_path / "stopped", best + 1, **settings)
    again, _ = run(model_folder, data_file, tmp_path / "stopped", resume=True, **settings)
    assert equal(tmp_path / "kept", tmp_path / "stopped")
    assert metrics(tmp_path / "kept") == metrics(tmp_path / "stopped")
    assert manifest(tmp_path / "kept", STEPS) == manifest(tmp_path / "stopped", STEPS)
    same = ("steps", "best_step", "eval_loss_before", "eval_loss_after", "tokens")
    assert {name: summary[name] for name in same} == {name: again[name] for name in same}


def test_a_run_stops_after_so_many_evaluations_without_a_new_best(model_folder, data_file, tmp_path):
    some = WANDERING | {"max_steps": 40, "learning_rate": 0.1}
    run(model_folder, data_file, tmp_path / "whole", **some)
    found, end, since, best = losses(tmp_path / "whole"), None, 0, math.inf
    for step, loss in found.items():
        since, best = (0, loss) if loss < best else (since + 1, best)
        if since == 3:
            end = step
            break
    assert 5 < end < 40
    some |= {"early_stopping": 3}
    summary, _ = run(model_folder, data_file, tmp_path / "early", **some)
    assert (summary["steps"], summary["planned_steps"]) == (end, 40)
    assert losses(tmp_path / "early") == {step: loss for step, loss in found.items() if step <= end}
    run(model_folder, data_file, tmp_path / "stopped", end - 1, **some)
    again, _ = run(model_folder, data_file, tmp_path / "stopped", resume=True, **some)
    assert (again["steps"], again["eval_loss_after"]) == (end, summary["eval_loss_after"])
    assert equal(tmp_path / "early", tmp_path / "stopped")
    assert metrics(tmp_path / "early") == metrics(tmp_path / "stopped")


def test_a_run_killed_while_it_ends_takes_no_step_more_and_one_that_lost_its_best_is_refused(
    model_folder, data_file, tmp_path
):
    some = WANDERING | {"max_steps": 40, "early_stopping": 3, "keep_best": True}
    output = tmp_path / "run"
    summary, _ = run(model_folder, data_file, output, **some)
    before, told = weights(output), metrics(output)
    shutil.rmtree(output / "model")
    (output / "summary.json").unlink()
    again, _ = run(model_folder, data_file, output, resume=True, **some)
    assert metrics(output) == told
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(output).items())
    assert {k: v for k, v in again.items() if "loss" in k or "step" in k} == {
        k: v for k, v in summary.items() if "loss" in k or "step" in k
    }

    # longer, without stopping: the best of before still counts
    longer = some | {"early_stopping": None, "max_steps": summary["steps"] + 1, "resume": True}
    found, _ = run(model_folder, data_file, output, allow_changes=True, **longer)
    assert (found["steps"], found["best_step"]) == (summary["steps"] + 1, summary["best_step"])

    # the best is gone
    (output / "summary.json").unlink()
    shutil.rmtree(output / "checkpoints" / f"checkpoint-{summary['best_step']}")
    with pytest.raises(UserError, match=r"it was the best so far: put a copy of it back, or add --allow-changes"):
        run(model_folder, data_file, output, **longer)
    found, said = run(
        model_folder, data_file, output, allow_changes=True, **longer | {"max_steps": longer["max_steps"] + 1}
    )
    assert "the best is looked for from here on" in said
    assert found["best_step"] == found["steps"]


def test_what_is_best():
    progress = Progress(step=0)
    assert not progress.is_best(Evaluation({"": 1.0}), by_scores=False)
    for step, loss, best in [(1, math.nan, None), (2, 3.0, 2), (3, 2.0, 3), (4, 2.0, 3), (5, math.nan, 3), (6, 9.0, 3)]:
        progress.step = step
        progress.is_best(Evaluation({"a": loss, "b": -step}), by_scores=False)
        assert (progress.best and progress.best.step) == best
    assert progress.since_best == 3
    assert not progress.is_best(Evaluation(None, {"t": 1.0}), by_scores=False)
    assert progress.since_best == 3, "the loss was not evaluated, so nothing was missed"
    progress.forget_best()
    for step, scores, best in [
        (7, {"x": 0.5, "y": 0.1}, 7),
        (8, {"x": 0.1, "y": 0.4}, 7),
        (9, {"x": 0.1, "y": 0.6}, 9),
    ]:
        progress.step = step
        progress.is_best(Evaluation({"": -step}, scores), by_scores=True)
        assert progress.best.step == best
    assert Progress.model_validate(json.loads(progress.model_dump_json())) == progress


@pytest.mark.parametrize("name", ["early_stopping", "keep_best"])
@pytest.mark.parametrize("more", [{}, {"eval_tasks": "gsm8k", "eval_steps": 4, "eval_rows": 3}])
def test_without_evaluations_in_between_both_are_refused(name, more):
    needed = {"model": "m", "data": "d", "output": "o", name: 1 if name == "early_stopping" else True}
    with pytest.raises(UserError, match=f"^{name} has no effect without evaluations while training: give eval_steps="):
        build_config(needed | more)
