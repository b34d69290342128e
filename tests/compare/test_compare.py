"""Grids, what is chosen from them, and comparisons that are stopped and go on."""

import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from lisatune import UserError
from lisatune.common.run_folder import only_run
from lisatune.common.signals import StopSignal
from lisatune.compare.grid import command, make_grid, read_grid
from lisatune.compare.results import interval, read_run, student_t
from lisatune.compare.runner import _wait_for, compare, run_in_child
from lisatune.compare.table import notes_of, show
from lisatune.errors import Stopped
from patience import HANG_SECONDS, started, wait_until
from places import HELPERS

NEEDED = {"model": "m", "data": "d", "eval_rows": 6, "max_steps": 8}


def quiet():
    return Console(file=io.StringIO(), width=400)


def write_run(folder, *, losses, tokens=100, seconds=1.0, peak=2**20, **summary):
    """A finished run whose steps all have ``tokens`` and take ``seconds``; ``losses`` are of the start and each step."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": 0, "eval_loss": losses[0], "plan": {"bytes_of": {"weights/decoder": 600, "activations": 400}}}]
    for step, loss in enumerate(losses[1:], start=1):
        rows.append({"step": step, "loss": 1.0, "tokens": tokens, "step_seconds": seconds})
        rows[-1] |= {} if loss is None else {"eval_loss": loss}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = len(losses) - 1
    numbers = {
        "steps": steps, "tokens": tokens * steps, "eval_loss_before": losses[0], "eval_loss_after": losses[-1],
        "train_seconds": seconds * steps + 1, "planned_peak_bytes": 1000, "peak_bytes": peak + 50, "base_bytes": 50,
        "state_bytes": 10,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(numbers | summary))


class Fake:
    """Stands for a run: what ``numbers`` returns of a trial is written as its folder, or is why it failed."""

    def __init__(self, numbers):
        self.numbers = numbers
        self.ran = []

    def __call__(self, trial, folder, stop, tick):
        self.ran.append(trial.name)
        tick()
        told = self.numbers(trial)
        if isinstance(told, str):
            return told
        write_run(folder / "runs" / trial.name, **told)
        return ""


def final(loss):
    return {"losses": [9.0, 5.0, loss]}


@pytest.fixture
def faked(model_folder, data_file, tmp_path, monkeypatch):
    """Compares with invented numbers; what ran is in ``faked.ran``. Pages have tests of their own."""
    monkeypatch.setattr("lisatune.compare.runner._write_page", lambda folder, console: None)

    def run(numbers, *words, output="cmp", **more):
        fake = Fake(numbers)
        given = read_grid(None, ["max_steps=2", "eval_rows=6", *words])
        if "model" not in given:
            given |= {"model": str(model_folder), "data": str(data_file)}
        result = compare(given, tmp_path / output, console=quiet(), run_one=fake, **more)
        run.ran = fake.ran
        return result

    return run


def entry(result, name):
    return next(e for e in result["contenders"] if e["name"] == name)


# ---- arithmetic


def test_the_peak_is_that_of_tensors_where_they_were_counted(tmp_path):
    """As the forecast that stands beside it; else what the process grew by."""
    write_run(tmp_path / "a", losses=[9.0, 5.0], peak=2**20)
    write_run(tmp_path / "b", losses=[9.0, 5.0], peak=2**20, tensor_peak_bytes=900)
    assert read_run(tmp_path / "a").own_bytes == 2**20
    assert read_run(tmp_path / "b").own_bytes == 900


@pytest.mark.parametrize(
    ("chance", "degrees", "expected"),  # NIST/SEMATECH e-Handbook, table of Student's t
    [
        (0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 3, 3.182), (0.95, 4, 2.776), (0.95, 9, 2.262), (0.95, 30, 2.042),
        (0.95, 100, 1.984), (0.90, 7, 1.895), (0.99, 5, 4.032), (0.99, 2, 9.925),
    ],
)  # fmt: skip
def test_quantiles_of_student_t(chance, degrees, expected):
    assert student_t(chance, degrees) == pytest.approx(expected, abs=6e-4)


def test_interval_by_hand():
    """Mean 2.5, standard deviation sqrt(5/3), four values: 3.182 * sqrt(5/3) / 2 to either side."""
    of_four = interval([1.0, 2.0, 3.0, 4.0])
    half = 3.18245 * math.sqrt(5 / 3) / 2
    assert of_four["mean"] == 2.5
    assert (of_four["low"], of_four["high"]) == pytest.approx((2.5 - half, 2.5 + half), abs=1e-5)
    assert interval([7.0]) == {"mean": 7.0, "low": None, "high": None, "values": [7.0]}


# ---- grids


def test_words_and_files_give_the_same_grid(tmp_path):
    words = ["methods=lisa,lora", "learning_rate=1e-4,3e-4", "seeds=0,1", "lora.learning_rate=1e-3,3e-3",
             "lora_target_modules=[q_proj, v_proj]"]  # fmt: skip
    file = tmp_path / "grid.yaml"
    file.write_text(
        "method: [lisa, lora]\nlearning_rate: [0.0001, 0.0003]\nseed: [0, 1]\nlora: {learning_rate: [0.001, 0.003]}\n"
        "lora_target_modules: [q_proj, v_proj]\n"
    )
    given = read_grid(None, words)
    assert given == read_grid(str(file), [])
    assert read_grid(str(file), ["seed=5"])["seed"] == 5
    made = make_grid(NEEDED | given, tmp_path / "cmp")
    assert made.contenders() == ["lisa", "lora"]
    rates = {(t.contender, t.config.learning_rate) for t in made.trials}
    assert rates == {("lisa", 1e-4), ("lisa", 3e-4), ("lora", 1e-3), ("lora", 3e-3)}
    assert all(t.config.lora_target_modules == ["q_proj", "v_proj"] for t in made.of("lora"))


def test_the_printed_command_gives_the_same_grid_again():
    import shlex

    words = ["methods=lisa,lora", "learning_rate=1e-05,3e-4", "lora.lora_r=4,8", "train_embedding=true,sampled",
             "lora_target_modules=[q_proj],[k_proj, v_proj]", 'decoder_name="a, b",true,"1",c d']  # fmt: skip
    given = NEEDED | read_grid(None, words)
    assert given["decoder_name"] == ["a, b", True, "1", "c d"]
    typed = shlex.split(command(given))
    assert typed[:8] == ["lisatune", "compare", "--model", "m", "--data", "d", "--output", "OUTPUT"]
    assert {"model": "m", "data": "d"} | read_grid(None, typed[8:]) == given


def test_settings_that_play_no_part_in_a_method_are_left_out():
    grid = NEEDED | {
        "method": ["lisa", "full"],
        "num_active": [1, 2],
        "interval_steps": [1, 5],
        "learning_rate": [1e-4, 1e-3],
    }
    made = make_grid(grid, Path("cmp"))
    assert made.contenders() == [*(f"lisa num_active={g} interval_steps={k}" for g in (1, 2) for k in (1, 5)), "full"]
    assert all(len(made.of(contender)) == 2 for contender in made.contenders())
    assert len({t.name for t in made.trials}) == 10


def test_contenders_take_turns_within_a_seed():
    made = make_grid(NEEDED | {"method": ["lisa", "full"], "learning_rate": [1e-4, 1e-3], "seed": [3, 1]}, Path("cmp"))
    order = [(t.config.seed, t.config.learning_rate, t.contender) for t in made.trials]
    assert order == [(s, r, m) for s in (3, 1) for r in (1e-4, 1e-3) for m in ("lisa", "full")]


def test_without_eval_steps_there_are_ten_points_of_a_curve():
    assert make_grid(NEEDED | {"max_steps": 200}, Path("c")).trials[0].config.eval_steps == 20
    assert make_grid(NEEDED | {"max_steps": 3}, Path("c")).trials[0].config.eval_steps == 1
    assert make_grid(NEEDED | {"eval_steps": 7}, Path("c")).trials[0].config.eval_steps == 7


def test_names_are_of_files_anywhere():
    made = make_grid(NEEDED | {"decoder_name": ["../../x", "a/b c", "c" * 300]}, Path("cmp"))
    for trial in made.trials:
        assert Path(trial.config.output).parent == Path("cmp/runs")
        assert len(trial.name) < 130
        assert all(letter.isalnum() or letter in "-_=.+" for letter in trial.name)
    assert len({t.name for t in made.trials}) == 3


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"method": ["lisa", "lora"], "learning_rate": [1e-4, 1e-3], "lora": {"learning_rate": [1e-3]}},
         r"different numbers of runs \(lisa: 2, lora: 1\): give each the same number of values of learning_rate"),
        ({"learning_rat": [1]}, "unknown setting 'learning_rat'; did you mean 'learning_rate'"),
        ({"learning_rate": [1e-4, 0.0001]}, "is in the grid twice"),
        ({"method": "lsia"}, "method='lsia': input should be"),
        ({"method": "full", "num_active": [1, 2]}, "num_active has no effect with method=full: leave it out, or add lisa"),
        ({"max_length": [64, 128]}, "max_length has several values, and their losses cannot be compared"),
        ({"lora": {"learning_rate": 1e-3}}, "settings for lora alone have no effect"),
        ({"lisa": {"seed": 3}}, "lisa.seed: all methods must have the same seed"),
        ({"search": "seed"}, "search=seed is not a setting that can be searched"),
        ({"eval_rows": 0}, "needs held-out rows: give eval_rows"),
        ({"num_active": []}, "num_active has no value"),
        ({"num_active": [1, 0]}, "num_active is 0"),
    ],
)  # fmt: skip
def test_grids_that_cannot_be(grid, message):
    with pytest.raises(UserError, match=message):
        make_grid(NEEDED | grid, Path("cmp"))


# ---- what is chosen and reported


def test_losses_and_differences_by_hand(faked):
    table = {("lisa", 0): 2.0, ("lisa", 1): 2.2, ("lisa", 2): 2.4, ("full", 0): 1.9, ("full", 1): 2.0, ("full", 2): 2.3}
    result = faked(lambda t: final(table[t.contender, t.config.seed]), "methods=lisa,full", "seed=0,1,2")
    lisa, full = entry(result, "lisa"), entry(result, "full")
    half = 4.30265 * 0.2 / math.sqrt(3)
    assert lisa["eval_loss"]["mean"] == pytest.approx(2.2)
    assert lisa["eval_loss"]["high"] - 2.2 == pytest.approx(half, abs=1e-5)
    difference = full["difference"]  # -0.1, -0.2, -0.1: mean -0.1333, standard deviation 0.057735
    half = 4.30265 * 0.0577350 / math.sqrt(3)
    assert (difference["mean"], difference["high"]) == pytest.approx((-0.133333, -0.133333 + half), abs=1e-5)
    assert not difference["excludes_zero"]
    assert not lisa["difference"]["excludes_zero"]
    sure = faked(
        lambda t: final(table[t.contender, t.config.seed] + (t.contender == "full")), "methods=lisa,full", "seed=0,1,2",
        output="sure",
    )  # fmt: skip
    assert entry(sure, "full")["difference"]["excludes_zero"]


def test_the_rate_of_each_seed_is_chosen_by_the_others(faked):
    """Each rate shines in one seed by luck; by the best of each seed the loss would be 1.0."""
    lucky = {(1e-4, 0): 1.0, (1e-4, 1): 3.0, (1e-4, 2): 3.2, (1e-3, 0): 2.0, (1e-3, 1): 2.0, (1e-3, 2): 1.0}
    result = faked(
        lambda t: final(lucky[t.config.learning_rate, t.config.seed]), "learning_rate=1e-4,1e-3", "seed=0,1,2"
    )
    lisa = entry(result, "lisa")
    assert lisa["chosen"] == {"learning_rate": 1e-3}
    # seed 0 is left to seeds 1 and 2, which choose 1e-3; seed 1 to 2.1 against 1.5; seed 2 to 2.0 against 2.0: the first
    assert lisa["chosen_by_seed"] == {
        "0": {"learning_rate": 1e-3},
        "1": {"learning_rate": 1e-3},
        "2": {"learning_rate": 1e-4},
    }
    assert lisa["eval_loss"]["values"] == [2.0, 2.0, 3.2]
    assert any(
        "the seeds do not agree on learning_rate (learning_rate=0.001 or learning_rate=0.0001)" in note
        for note in notes_of(result)
    )


def test_one_seed_is_told(faked):
    result = faked(lambda t: final(2.0), "methods=lisa,full", "learning_rate=1e-4,1e-3")
    assert entry(result, "full")["eval_loss"]["low"] is None
    assert not entry(result, "full")["difference"]["excludes_zero"]
    notes = notes_of(result)
    assert any(note.startswith("One seed: no interval, and learning_rate was chosen by the loss") for note in notes)
    assert not any("was not tuned" in note for note in notes)
    assert "±" not in printed(result)


@pytest.mark.parametrize("seeds", ["seed=0", "seed=0,1"])
def test_what_was_not_tuned_is_told(faked, seeds):
    notes = notes_of(faked(lambda t: final(2.0 + t.config.seed), "methods=lisa,full", seeds))
    assert "learning_rate was not tuned, and methods want different values: give several." in notes
    assert not any("chosen" in note for note in notes)


@pytest.mark.parametrize(("best", "edge"), [(1e-4, "lowest"), (3e-4, None), (1e-3, "highest")])
def test_a_rate_at_the_edge_of_its_grid_is_told(faked, best, edge):
    result = faked(lambda t: final(1.0 + abs(math.log(t.config.learning_rate / best))), "learning_rate=1e-4,3e-4,1e-3")
    assert entry(result, "lisa")["edge"] == ({} if edge is None else {"learning_rate": edge})
    told = [note for note in notes_of(result) if "at the edge of the grid" in note]
    assert len(told) == (edge is not None)
    assert (f"({edge})" in printed(result)) == (edge is not None)


def test_a_failed_run_is_told_and_the_others_go_on(faked):
    def numbers(trial):
        if trial.config.learning_rate == 1e-2 and trial.config.seed == 1 and trial.contender == "full":
            return "step 3: the loss is nan"
        return final(1.0 if trial.config.learning_rate == 1e-2 else 2.0)

    words = ("methods=lisa,full", "learning_rate=1e-3,1e-2", "seed=0,1")
    result = faked(numbers, *words)
    assert len(faked.ran) == 8
    lisa, full = entry(result, "lisa"), entry(result, "full")
    assert (lisa["chosen"], full["chosen"]) == ({"learning_rate": 1e-2}, {"learning_rate": 1e-3})
    assert full["failed"] == {"full-learning_rate=0.01-seed=1": "step 3: the loss is nan"}
    assert full["edge"] == {"learning_rate": "lowest"}
    assert "full-learning_rate=0.01-seed=1 failed: step 3: the loss is nan" in printed(result)
    again = faked(numbers, *words)
    assert faked.ran == []
    assert again == result
    mended = faked(lambda t: final(1.0), *words, retry=True)
    assert faked.ran == ["full-learning_rate=0.01-seed=1"]
    assert entry(mended, "full")["failed"] == {}


def test_a_contender_without_a_whole_choice_has_failed(faked):
    result = faked(lambda t: "out of memory" if t.contender == "full" else final(2.0), "methods=full,lisa", "seed=0,1")
    assert entry(result, "full")["status"] == "failed"
    assert result["reference"] == "lisa"
    assert "failed" in printed(result)
    nothing = faked(lambda t: {"losses": [9.0, 5.0, math.nan]}, "seed=0,1", output="nan")
    assert entry(nothing, "lisa")["status"] == "failed"
    assert "the held-out loss is no number" in printed(nothing)


def test_equal_time_and_equal_tokens_by_hand(faked):
    """The slow one has had 2 of its 4 seconds when the fast one ends; the long one 200 of its 400 tokens at the short one's end."""

    def numbers(trial):
        fast = trial.contender == "full"
        return {"losses": [9.0, 5.0, 3.0], "seconds": 0.75} if fast else {"losses": [9.0, 4.0, 2.0], "seconds": 2.0}

    result = faked(numbers, "methods=lisa,full", "seed=0,1")
    assert result["equal"]["fastest"] == "full"
    assert result["equal"]["seconds"] == {"0": 1.5, "1": 1.5}
    assert entry(result, "full")["equal_time"]["mean"] == 3.0
    assert entry(result, "lisa")["equal_time"]["mean"] == 9.0 - 5.0 * 0.75
    assert entry(result, "lisa")["equal_tokens"]["mean"] == 2.0
    assert any("when full had ended" in note for note in notes_of(result))

    def unequal(trial):
        long = trial.config.num_active == 2
        return {"losses": [9.0, 4.0, 2.0], "tokens": 200} if long else {"losses": [9.0, 4.0, 2.0], "tokens": 100}

    result = faked(unequal, "num_active=1,2", output="tokens")
    assert result["equal"]["tokens"] == {"0": 200}
    assert entry(result, "lisa num_active=2")["equal_tokens"]["mean"] == 4.0
    assert "at 200 tokens" in printed(result)


def test_equal_time_needs_losses_on_the_way(faked):
    def numbers(trial):
        return {"losses": [9.0, None, 3.0], "seconds": 1.0 if trial.contender == "full" else 2.0}

    result = faked(numbers, "methods=lisa,full")
    assert entry(result, "lisa")["equal_time"] is None
    assert any("give eval_steps" in note for note in notes_of(result))


def test_equal_memory_and_the_frontier(faked):
    peaks = {1: (2**30, 3.0), 2: (2 * 2**30, 2.0), 4: (3 * 2**30, 2.5)}

    def numbers(trial):
        peak, loss = peaks.get(trial.config.num_active if trial.contender != "full" else 0, (4 * 2**30, 1.0))
        return final(loss) | {"peak": peak}

    result = faked(numbers, "methods=lisa,full", "num_active=1,2,4")
    assert [e["peak_bytes"] for e in result["contenders"]] == [2**30, 2 * 2**30, 3 * 2**30, 4 * 2**30]
    assert [e["frontier"] for e in result["contenders"]] == [True, True, False, True]
    assert result["equal"]["best_within_bytes"] == {"lisa": "lisa num_active=1", "full": None}
    assert any("lisa: lisa num_active=1; full: nothing fits" in note for note in notes_of(result))
    wider = faked(numbers, "methods=lisa,full", "num_active=1,2,4", memory_bytes=3 * 2**30)
    assert faked.ran == []
    assert wider["equal"]["best_within_bytes"] == {"lisa": "lisa num_active=2", "full": None}


def test_other_settings_can_be_searched(faked):
    result = faked(
        lambda t: final(t.config.num_active), "search=num_active,learning_rate", "num_active=2,1,3", "seed=0,1"
    )
    assert [e["name"] for e in result["contenders"]] == ["lisa"]
    assert entry(result, "lisa")["chosen"] == {"num_active": 1}
    assert entry(result, "lisa")["edge"] == {"num_active": "lowest"}


@pytest.mark.parametrize("width", [50, 80, 400])
def test_no_number_is_cut_off_in_a_narrow_terminal(faked, width):
    result = faked(lambda t: final(2.0 + t.config.seed / 8), "methods=lisa,full", "learning_rate=1e-4,1e-3", "seed=0,1")
    out = Console(file=io.StringIO(), width=width)
    out.print(show(result))
    text = out.file.getvalue()
    assert "…" not in text
    assert text.count("2.0625 ± 0.7941") == 2 * 2  # at the end, and at equal time
    assert text.count("┏") == (1 if width == 400 else text.count("│ full"))


def test_task_scores_are_shown_where_runs_have_some(faked):
    result = faked(lambda t: final(2.0) | {"scores": {"gsm8k": 0.25 + t.config.seed / 2}}, "seed=0,1")
    assert entry(result, "lisa")["scores"]["gsm8k"]["values"] == [0.25, 0.75]
    assert "gsm8k" in printed(result)


# ---- going on


def test_a_comparison_may_grow_and_runs_nothing_twice(faked, tmp_path):
    faked(lambda t: final(2.0), "learning_rate=1e-4", "seed=0", "lisa.num_active=2")
    assert len(faked.ran) == 1
    faked(lambda t: final(2.0), "methods=lisa,full", "learning_rate=1e-4,1e-3", "seed=0,1", "lisa.num_active=2")
    assert len(faked.ran) == 7
    grown = faked(lambda t: final(2.0), "methods=lisa,full", "learning_rate=1e-4,1e-3", "seed=0,1", "num_active=2,4")
    assert len(faked.ran) == 4
    assert {e["name"] for e in grown["contenders"]} == {"lisa num_active=2", "lisa num_active=4", "full"}
    assert all(e["status"] == "finished" for e in grown["contenders"])
    again = compare({}, tmp_path / "cmp", console=quiet(), run_one=Fake(lambda t: "ran"))
    assert again == grown


def test_another_comparison_is_refused_with_what_differs(faked, tmp_path):
    faked(lambda t: final(2.0), "learning_rate=1e-4,1e-3", "seed=0,1")
    before = (tmp_path / "cmp" / "comparison.yaml").read_text()
    with pytest.raises(UserError, match=r"of 4 runs, and this grid lacks 2 of them: seed=1 \(was \[0, 1\]\). Put back"):
        faked(lambda t: final(2.0), "learning_rate=1e-4,1e-3", "seed=1")
    with pytest.raises(UserError, match=r"this grid lacks 4 of them: warmup_steps=1 \(was not given\)"):
        faked(lambda t: final(2.0), "learning_rate=1e-4,1e-3", "seed=0,1", "warmup_steps=1")
    assert (tmp_path / "cmp" / "comparison.yaml").read_text() == before


def test_changed_data_are_refused(faked, data_file):
    faked(lambda t: final(2.0))
    with data_file.open("a") as file:
        file.write('{"prompt": "And one?", "completion": "More."}\n')
    with pytest.raises(UserError, match="the data have changed since the comparison began"):
        faked(lambda t: final(2.0))


def test_what_is_wrong_is_told_before_the_first_run(faked, tmp_path, data_file):
    with pytest.raises(UserError, match="num_active is 9, but the model has 4"):
        faked(lambda t: final(2.0), "num_active=2,9")
    with pytest.raises(UserError, match="no such model folder"):
        faked(lambda t: final(2.0), "model=./nowhere", f"data={data_file}")
    assert not (tmp_path / "cmp").exists()
    (tmp_path / "cmp").mkdir()
    (tmp_path / "cmp" / "precious").write_text("x")
    with pytest.raises(UserError, match="is not empty, and holds no comparison"):
        faked(lambda t: final(2.0))
    with pytest.raises(UserError, match="holds no comparison to resume"):
        compare({}, tmp_path / "nothing", console=quiet())


def test_two_comparisons_cannot_share_a_folder(faked, tmp_path):
    (tmp_path / "cmp").mkdir()
    with only_run(tmp_path / "cmp"), pytest.raises(UserError, match="another process"):
        faked(lambda t: final(2.0))


def test_a_run_that_outlived_its_comparison_is_waited_for(tmp_path):
    waited = []
    held = only_run(tmp_path)
    held.__enter__()

    def tick():
        waited.append(1)
        if len(waited) == 2:
            held.__exit__(None, None, None)

    _wait_for(tmp_path, StopSignal(), tick)
    assert len(waited) == 2


def test_weights_can_be_dropped(faked, tmp_path):
    def numbers(trial):
        (tmp_path / "cmp" / "runs" / trial.name / "model").mkdir(parents=True)
        return final(2.0)

    faked(numbers, drop_models=True)
    assert not list((tmp_path / "cmp" / "runs").glob("*/model"))
    assert list((tmp_path / "cmp" / "runs").glob("*/summary.json"))


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("echo 'step 1'; echo 'lisatune: the loss is nan: try less' >&2; exit 2", "the loss is nan: try less"),
        ("kill -9 $$", "the process was ended by signal 9, as the system does when memory runs out"),
        (
            "echo 'RuntimeError: boo' >&2; exit 1",
            "the process ended with status 1: RuntimeError: boo (all of it in runs/",
        ),
        ("exit 2", "the process ended with status 2 (all of it in runs/"),
        ("exit 0", ""),
    ],
)
def test_why_a_child_failed(tmp_path, monkeypatch, script, sentence):
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!/bin/sh\n{script}\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    trial = make_grid(NEEDED, tmp_path).trials[0]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / f"{trial.name}.log").write_text("lisatune: an older failure\n")
    told = run_in_child(trial, tmp_path, StopSignal(), lambda: None)
    assert told.startswith(sentence) if sentence else told == ""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc to read a process's group from")
def test_a_child_has_a_group_of_its_own(tmp_path, monkeypatch):
    """Or Ctrl-C would reach it twice, from the terminal and from us, and the second time ends it before it has saved."""
    stand_in = tmp_path / "python"
    stand_in.write_text("#!/bin/sh\nread _ _ _ _ group _ < /proc/$$/stat; echo lisatune: $group >&2; exit 2\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    (tmp_path / "runs").mkdir()
    told = run_in_child(make_grid(NEEDED, tmp_path).trials[0], tmp_path, StopSignal(), lambda: None)
    assert int(told) != os.getpgrp()


# ---- real runs


def in_process(trial, folder, stop, tick):
    from lisatune.train import train

    train(trial.config, console=quiet(), resume=True)
    return ""


TINY = ["max_length=64", "per_device_train_batch_size=4", "eval_rows=6"]
MEASURED = {"peak_bytes", "tokens_per_second", "train_seconds", "step_seconds", "seconds", "fastest", "equal_time", "bytes",
            "best_within_bytes", "fits", "frontier", "command"}  # fmt: skip


def steady(value):
    """``value`` without times and measured bytes."""
    if isinstance(value, dict):
        return {name: steady(inner) for name, inner in value.items() if name not in MEASURED}
    return [steady(inner) for inner in value] if isinstance(value, list) else value


def test_a_comparison_that_is_cut_short_ends_like_one_that_never_was(model_folder, data_file, memory_path, monkeypatch):
    monkeypatch.setattr("lisatune.compare.runner._write_page", lambda folder, console: None)
    monkeypatch.setattr("lisatune.run.finish.report_if_possible", lambda folder, console: None)
    words = [*TINY, "max_steps=4", "eval_steps=2", "methods=lisa,full", "learning_rate=1e-3,1e-2", "seed=0,1"]
    words += ["num_active=1", "interval_steps=2"]
    given = {"model": str(model_folder), "data": str(data_file)} | read_grid(None, words)
    straight = compare(given, memory_path / "straight", console=quiet(), run_one=in_process)
    begun = []

    def cut(trial, folder, stop, tick):
        begun.append(trial.name)
        if len(begun) == 4:
            raise OSError("the power went")
        return in_process(trial, folder, stop, tick)

    with pytest.raises(OSError, match="the power went"):
        compare(given, memory_path / "cut", console=quiet(), run_one=cut)
    partial = json.loads((memory_path / "cut" / "comparison.json").read_text())
    assert len(partial["finished"]) == 3
    assert any("5 of 8 runs are not finished" in note for note in notes_of(partial))
    resumed = compare({}, memory_path / "cut", console=quiet(), run_one=in_process)
    assert steady(resumed) == steady(straight)
    assert resumed == json.loads((memory_path / "cut" / "comparison.json").read_text())
    lisa, full = straight["contenders"]
    assert lisa["state_bytes"] < full["state_bytes"]
    assert all(e["eval_loss"]["mean"] < e["eval_loss_before"] for e in (lisa, full))
    assert [point["step"] for point in lisa["curve"]] == [0, 2, 4]
    assert lisa["curve"][-1]["eval_loss"] == pytest.approx(lisa["eval_loss"]["mean"])
    assert read_run(memory_path / "cut" / "runs" / "nothing") is None


SCRIPT = """
import sys
from pathlib import Path
from rich.console import Console
from lisatune.compare.runner import compare
from lisatune.compare.grid import read_grid
from lisatune.errors import Stopped
assert "torch" not in sys.modules
sys.executable = sys.argv[1]
try:
    compare(read_grid(None, sys.argv[3:]), Path(sys.argv[2]), console=Console(stderr=True, width=300))
except Stopped as stopped:
    print(stopped, file=sys.stderr)
    sys.exit(128 + stopped.signal)
"""


def test_interrupted_with_children_of_its_own(model_folder, data_file, memory_path):
    """Ctrl-C in the middle of a run: the run saves itself, and the comparison goes on from there.

    Its python stays in the sixth step until the signal has come.
    """
    stand_in = memory_path / "python"
    held = HELPERS / "held.py"
    stand_in.write_text(f'#!/bin/sh\nshift 2  # -m lisatune\nexec "{sys.executable}" "{held}" 5 "$@"\n')
    stand_in.chmod(0o755)
    words = [*TINY, "max_steps=20", "eval_steps=10", "num_active=1", "save_steps=20"]
    words = [f"model={model_folder}", f"data={data_file}", *words]
    start = [sys.executable, "-c", SCRIPT, str(stand_in), str(memory_path / "cmp")]
    run = memory_path / "cmp" / "runs" / "lisa-seed=0"
    with started([*start, *words], stderr=subprocess.PIPE, start_new_session=True) as parent:
        metrics = run / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 5, parent)
        os.killpg(parent.pid, signal.SIGINT)  # as a terminal does
        said = parent.communicate(timeout=HANG_SECONDS)[1]
    assert parent.returncode == 130, said
    assert "stopped after 0 of 1 runs; resume with: lisatune compare --output" in said
    assert "stopped after step" in run.with_name(run.name + ".log").read_text()
    done = subprocess.run(start, stderr=subprocess.PIPE, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    assert "going on after step" in run.with_name(run.name + ".log").read_text()
    straight = compare(read_grid(None, words), memory_path / "straight", console=quiet(), run_one=in_process)
    resumed = json.loads((memory_path / "cmp" / "comparison.json").read_text())
    assert steady(resumed) == steady(straight)
    assert (memory_path / "cmp" / "report.html").exists()
    assert yaml.safe_load((run / "config.yaml").read_text())["learning_rate"] == 5e-5


def test_stopped_between_runs(faked, tmp_path):
    def numbers(trial):
        signal.raise_signal(signal.SIGTERM)
        return final(2.0)

    with pytest.raises(Stopped, match="stopped after 1 of 3 runs") as stopped:
        faked(numbers, "seed=0,1,2")
    assert stopped.value.signal == signal.SIGTERM


def printed(result):
    out = quiet()
    out.print(show(result))
    return out.file.getvalue()
