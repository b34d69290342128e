"""``profile_steps``: labels on the points of a step, which change no bit and are taken off again."""

import io
import itertools
import json

import pytest
import torch
from rich.console import Console

from lisatune import UserError
from lisatune.run.build import build
from lisatune.run.preflight import preflight
from lisatune.run.profiler import LABELS, WARM_UP, Clock
from lisatune.settings import build_config
from lisatune.train import train_built
from runs import run, weights

SOME = {"max_steps": WARM_UP + 4, "eval_steps": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 9}


def test_each_moment_belongs_to_the_innermost_label():
    """A clock that ticks at each mark: the two ends of a label in a label are the outer one's."""
    clock = Clock(torch.device("cpu"), now=itertools.count().__next__)
    with clock.label("backward"), clock.label("loss"), clock.label("forward"):  # begin at 0, 1, 2 and end at 3, 4, 5
        assert clock.running
    assert list(clock.each("data", "ab")) == ["a", "b"]  # 6 to 11, asked once more than there are items
    assert not clock.running
    expected = dict.fromkeys(LABELS, 0.0) | {"backward": 2000.0, "loss": 2000.0, "forward": 1000.0, "data": 3000.0}
    assert clock.milliseconds() == expected
    assert clock.gpu_milliseconds() == {}


@pytest.mark.parametrize(
    "settings", [{}, {"optimizer_in_backward": True, "max_grad_norm": 0, "gradient_accumulation_steps": 1}]
)
def test_a_profile_changes_no_bit_and_counts_steps_alone(model_folder, data_file, memory_path, settings):
    settings = SOME | settings
    run(model_folder, data_file, memory_path / "plain", **settings)
    _, said = run(model_folder, data_file, memory_path / "run", profile_steps=3, **settings)
    a, b = weights(memory_path / "plain"), weights(memory_path / "run")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not (memory_path / "plain" / "profile").exists()

    # evaluations after each step call the model too, and are no part of a step
    folder = memory_path / "run" / "profile"
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    named = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    passes = 3 * settings["gradient_accumulation_steps"]
    assert (named.count("forward"), named.count("loss"), named.count("backward")) == (passes, passes, 3)
    assert set(LABELS) <= set(named)

    found = json.loads((folder / "profile.json").read_text())
    assert (found["first_step"], found["steps"]) == (WARM_UP + 1, 3)
    assert sum(found["milliseconds"].values()) == pytest.approx(found["step_milliseconds"])
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert all(found["milliseconds"][label] > 0 for label in LABELS)
    pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
    for text in (said, (memory_path / "run" / "report.html").read_text()):
        assert "part of a step" in text
        assert f"means of steps {WARM_UP + 1} to {WARM_UP + 3}" in text


def test_labels_are_taken_off_after_the_profiled_steps(model_folder, data_file, memory_path):
    settings = {"model": str(model_folder), "data": str(data_file), "output": str(memory_path / "run"), "num_active": 2}
    config = build_config(settings | {"max_steps": WARM_UP + 2, "profile_steps": 1, "eval_rows": 6, "method": "lisa"})
    console = Console(file=io.StringIO())
    begun = build(config, *preflight(config), console=console)
    batches, seen = begun.batches, []

    def watched(progress):
        for item in batches(progress):
            seen.append(sorted(set(vars(begun.learner)) & {"backward", "clip"} | set(vars(begun)) & {"step"}))
            yield item

    begun.batches = watched
    train_built(begun, console=console)
    assert seen == [[]] * WARM_UP + [["backward", "clip", "step"]] + [[]]


def test_too_few_steps_are_refused_and_told_when_a_run_goes_on(model_folder, data_file, memory_path):
    with pytest.raises(UserError, match=r"profile_steps=3 needs 6 steps.*the run has 5: lower it"):
        run(model_folder, data_file, memory_path / "short", profile_steps=3, max_steps=5)
    run(model_folder, data_file, memory_path / "run", 2, max_steps=5)
    _, said = run(model_folder, data_file, memory_path / "run", resume=True, profile_steps=1, max_steps=5)
    assert "3 are left: there will be no profile" in said
    assert not (memory_path / "run" / "profile").exists()
