"""Old names of settings work for one version, with a warning."""

from pathlib import Path

import pytest
import yaml

from lisatune import UserError
from lisatune.compare.grid import make_grid
from lisatune.errors import RenamedSetting
from lisatune.settings import ROWS, build_config, differences, used_settings
from lisatune.settings.renamed import NEW_NAMES

NEEDED = {"model": "m", "data": "d", "output": "o"}
OLD = {"eval_every": 7, "inactive_learning_rate": 0.1, "log_to": "tensorboard"}
TASKS = {"eval_tasks": "gsm8k"}


def test_these_are_the_old_names():
    assert set(NEW_NAMES) == set(OLD)


@pytest.mark.parametrize("old", OLD)
def test_an_old_name_sets_the_new_one_and_warns(old):
    with pytest.warns(RenamedSetting, match=f"^{old} is called {NEW_NAMES[old]} now: use the new name"):
        config = build_config(NEEDED | TASKS | {old: OLD[old]})
    assert getattr(config, NEW_NAMES[old]) == OLD[old]
    assert old not in used_settings(config)


@pytest.mark.parametrize("old", OLD)
def test_both_names_at_once_are_refused(old):
    with pytest.raises(UserError, match=f"^{old} is the old name of {NEW_NAMES[old]}: give one of them"):
        build_config(NEEDED | TASKS | {old: OLD[old], NEW_NAMES[old]: OLD[old]})


@pytest.mark.parametrize("old", OLD)
def test_a_run_that_was_stopped_under_the_old_name_resumes(old):
    """What a checkpoint or config.yaml of an earlier version holds is the same run; another value is another."""
    now = used_settings(build_config(NEEDED | TASKS | {NEW_NAMES[old]: OLD[old]}))
    before = {old if name == NEW_NAMES[old] else name: value for name, value in now.items()}
    assert differences(yaml.safe_load(yaml.safe_dump(before)), now) == []
    changed = [] if ROWS[NEW_NAMES[old]].free else [f"{NEW_NAMES[old]}={OLD[old]} (was 8)"]
    assert differences(before | {old: 8}, now) == changed


def test_a_run_that_was_stopped_before_there_was_a_setting_resumes():
    now = used_settings(build_config(NEEDED))
    before = {name: value for name, value in now.items() if name != "state_policy"}
    assert differences(before, now) == []
    assert differences(before, now | {"state_policy": "keep"}) == ["state_policy=keep (was reset_layers)"]


def test_a_comparison_understands_old_names():
    given = NEEDED | {"method": ["lisa", "full"], "eval_rows": 3, "max_steps": 9}
    with pytest.warns(RenamedSetting):
        old = make_grid(given | {"lisa": {"inactive_learning_rate": 0.1}}, Path("cmp"))
    new = make_grid(given | {"lisa": {"frozen_learning_rate": 0.1}}, Path("cmp"))
    assert [trial.config for trial in old.trials] == [trial.config for trial in new.trials]


def test_what_an_earlier_version_wrote_down_without_an_effect_stops_no_resume():
    """Adam's numbers of an optimizer that reads none are refused today, and left out of what a run writes down."""
    now = used_settings(build_config({"model": "m", "data": "d", "output": "o", "method": "full", "optim": "sgd"}))
    before = now | {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
    assert differences(before, now) == []
    other = used_settings(build_config({"model": "m", "data": "d", "output": "o", "method": "full", "optim": "adamw"}))
    assert "optim=sgd (was adamw)" in differences(other, now)
