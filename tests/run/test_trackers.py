"""Trackers by accelerate's names: tensorboard for real, and what is refused before anything is loaded."""

import inspect
import json
from pathlib import Path

import pytest

from lisatune import UserError
from lisatune.run.preflight import preflight
from lisatune.run.trackers import TRACKERS, Place
from lisatune.settings import build_config
from lisatune.settings.machine import PACKAGES
from runs import metrics, run

NEEDED = {"model": "m", "data": "d", "output": "o"}


def scalars(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_they_are_accelerates_and_are_made_as_it_makes_them():
    tracking = pytest.importorskip("accelerate.tracking", reason="accelerate is not installed")
    assert set(TRACKERS) == set(PACKAGES) == {str(name) for name in tracking.LOGGER_TYPE_TO_CLASS}
    for name, tracker in TRACKERS.items():
        for at in (Place(Path("run"), "p", "n", None, 0), Place(Path("run"), "p", "n", "known", 5)):
            signature = inspect.signature(tracking.LOGGER_TYPE_TO_CLASS[name].__init__)
            signature.bind(None, **tracker.options(at))


def test_tensorboard_gets_each_number_once_from_a_resumed_run_too(model_folder, data_file, tmp_path):
    pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
    some = {"report_to": ["tensorboard"], "max_steps": 6}
    run(model_folder, data_file, tmp_path / "run", 3, **some)
    run(model_folder, data_file, tmp_path / "run", resume=True, **some)
    expected = [(row["step"], row["loss"]) for row in metrics(tmp_path / "run")[1:]]
    found = scalars(tmp_path / "run", "loss")
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [value for _, value in found] == pytest.approx([value for _, value in expected])
    assert [step for step, _ in scalars(tmp_path / "run", "eval_loss")] == [0, 6]
    assert not [path for path in (tmp_path / "run" / "tensorboard").iterdir() if path.is_dir()], (
        "no second run of settings"
    )


def test_a_tracker_that_is_not_installed_or_does_not_exist_is_refused_first(tmp_path, monkeypatch):
    """Before the data are read: there are none here."""
    config = build_config(
        NEEDED | {"report_to": "tensorboard,mlflow", "output": str(tmp_path / "run"), "model": "org/name"}
    )
    present = {"tensorboard", "accelerate"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in present else None)
    with pytest.raises(
        UserError, match=r"^report_to=mlflow needs the package mlflow: pip install 'lisatune\[mlflow\]'$"
    ):
        preflight(config)
    present |= {"mlflow"}
    present -= {"accelerate"}
    with pytest.raises(
        UserError, match=r"report_to=tensorboard needs the package accelerate: pip install 'lisatune\[tensorb"
    ):
        preflight(config)
    with pytest.raises(UserError, match="report_to=comet: there is no such tracker; did you mean 'comet_ml'"):
        build_config(NEEDED | {"report_to": ["wandb", "comet"]})
    with pytest.raises(UserError, match="run_name has no effect without a tracker: set report_to"):
        build_config(NEEDED | {"run_name": "a"})


def test_a_tracker_that_cannot_start_is_a_sentence(model_folder, data_file, tmp_path):
    pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
    (tmp_path / "run").mkdir()
    run(model_folder, data_file, tmp_path / "run", 2)
    (tmp_path / "run" / "tensorboard").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="report_to=tensorboard: it cannot be started"):
        run(model_folder, data_file, tmp_path / "run", resume=True, report_to="tensorboard")


def test_settings_are_plain_values_for_a_tracker():
    from lisatune.run.trackers import _plain

    settings = _plain(build_config(NEEDED | {"data": [{"path": "a", "share": 1}]}).model_dump())
    assert json.loads(settings["data"]) == [{"path": "a", "share": 1}]
    assert settings["seed"] == 0
    assert "max_steps" not in settings
