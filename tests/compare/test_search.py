"""``search=optuna``: equal trials, and values that depend on nothing but the runs before them."""

import math

import pytest
from test_compare import Fake, entry, final, quiet

from lisatune import UserError
from lisatune.compare.grid import make_grid, read_grid
from lisatune.compare.results import results
from lisatune.compare.runner import compare
from lisatune.compare.search import suggest

pytest.importorskip("optuna", reason="the extra 'optuna' is not installed")

WORDS = ["max_steps=2", "eval_rows=6", "search=optuna", "methods=lisa,lora", "learning_rate=1e-5,1e-1", "seed=0,1"]
BEST = {"lisa": 1e-3, "lora": 1e-2}


def loss_of(trial):
    """The least at the best rate of its method, and a little worse under the other seed."""
    return 2 + math.log10(trial.config.learning_rate / BEST[trial.config.method]) ** 2 + 0.01 * trial.config.seed


@pytest.fixture
def searched(model_folder, data_file, tmp_path, monkeypatch):
    """Compares with invented losses; what ran is in ``searched.ran``."""
    monkeypatch.setattr("lisatune.compare.runner._write_page", lambda folder, console: None)

    def run(*words, output="cmp", numbers=lambda trial: final(loss_of(trial)), **more):
        fake = Fake(numbers)
        given = read_grid(None, [*WORDS, *words]) | {"model": str(model_folder), "data": str(data_file)}
        run.ran = fake.ran
        return compare(given, tmp_path / output, console=quiet(), run_one=fake, **more)

    return run


def test_every_contender_gets_equal_trials_and_comes_near_its_best(searched):
    result = searched("trials=12")
    assert len(searched.ran) == len(set(searched.ran)) == 2 * 12 * 2
    assert result["runs_per_contender"] == 24
    for method, best in BEST.items():
        found = entry(result, method)
        assert found["status"] == "finished"
        assert len(found["by_search"]) == 12
        assert abs(math.log10(found["chosen"]["learning_rate"] / best)) < 0.5
        assert found["edge"] == {}
    rates = [tried["searched"]["learning_rate"] for tried in entry(result, "lisa")["by_search"]]
    assert all(1e-5 <= rate <= 1e-1 for rate in rates)
    assert max(rates) / min(rates) > 100, "by the logarithm"


def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(searched, tmp_path):
    """Killed after some runs of a round, failed in between, and made longer: the same runs in the same order."""

    def sometimes(trial):
        return "too large" if not 1e-4 < trial.config.learning_rate < 2e-2 else final(loss_of(trial))

    searched("trials=6", output="straight", numbers=sometimes)
    straight = searched.ran
    ran = []

    def killed(after):
        def numbers(trial):
            if len(ran) == after:
                raise KeyboardInterrupt
            ran.append(trial.name)
            return sometimes(trial)

        return numbers

    for after in (3, 10):
        with pytest.raises(KeyboardInterrupt):
            searched("trials=4", numbers=killed(after))
    searched("trials=4", numbers=killed(None))
    result = searched("trials=6", numbers=killed(None))
    assert ran == straight
    assert any(run["status"] == "failed" for run in result["runs"]), "or this test shows less than it says"
    with pytest.raises(UserError, match="this grid lacks 24 of them: learning_rate"):
        searched("trials=6", "learning_rate=1e-4,1e-2")


def test_words_and_whole_numbers_are_searched_too(model_folder):
    space = {"state_policy": ["keep", "reset_all"], "num_active": [1, 4], "weight_decay": [0, 0.1]}
    tried = []
    for number in range(12):
        values = suggest(space, tried, "lisa")
        assert suggest(space, tried, "lisa") == values != suggest(space, tried, "other")
        assert values["state_policy"] in space["state_policy"]
        assert isinstance(values["num_active"], int)
        assert 1 <= values["num_active"] <= 4
        assert 0 <= values["weight_decay"] <= 0.1
        tried.append((values, math.inf if number == 3 else values["weight_decay"]))
    with pytest.raises(UserError, match="lisa: nothing new is left to try after 2 trials: lower trials"):
        suggest({"train_norms": [True, False]}, [({"train_norms": v}, 1.0) for v in (True, False)], "lisa")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["search=optuna"], "search=optuna needs the number of trials of each contender: give trials=30"),
        (["search=optuna", "trials=0"], "needs the number of trials"),
        (["trials=3"], "trials has no effect without search=optuna"),
        (["search=optuna", "trials=3"], "lisa: search=optuna needs a range of learning_rate: give the least and the most"),
        (["search=optuna,lora_r", "trials=3", "learning_rate=1e-5,1e-3", "lora_r=2,8"], "lora_r has no effect with method=lisa"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused(tmp_path, words, message):
    given = read_grid(None, ["model=m", "data=d", "max_steps=2", "eval_rows=6", *words])
    with pytest.raises(UserError, match=message):
        make_grid(given, tmp_path / "cmp")


def test_without_optuna_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    given = read_grid(None, ["model=m", "data=d", *WORDS, "trials=3"])
    with pytest.raises(UserError, match=r"search=optuna needs the package optuna: pip install 'lisatune\[optuna\]'"):
        make_grid(given, tmp_path / "cmp")


def test_a_round_that_has_not_ended_is_the_last_that_is_known(tmp_path):
    given = read_grid(None, ["model=m", "data=d", *WORDS, "trials=5"])
    grid = make_grid(given, tmp_path / "cmp")
    assert (len(grid.trials), grid.planned) == (4, 20)
    assert [trial.contender for trial in grid.trials] == ["lisa", "lisa", "lora", "lora"]
    assert results(grid, {}, {})["runs_per_contender"] == 2
