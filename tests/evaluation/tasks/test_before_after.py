"""``lisatune eval``: a run's model before and after training, in a table, a file, and the run's summary."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")

from lisatune import UserError
from lisatune.cli.app import app
from lisatune.compare.grid import make_grid
from lisatune.compare.results import read_run, results
from lisatune.compare.table import table_of
from lisatune.evaluation.tasks.score import Score, difference
from lisatune.evaluation.tasks.scorer import Scorer
from patience import HANG_SECONDS
from runs import run
from small_tasks import write_tasks
from tiny import make_llama, make_tokenizer

WORDS = ["--tasks", "winogrande,mmlu_anatomy", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_folder):
    """A run that has moved a long way, so that its scores differ from those of its base."""
    place = tmp_path_factory.mktemp("trained")
    rows = [{"text": f"the answer is D, and {i} times D"} for i in range(20)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(model_folder, place / "rows.jsonl", place / "run", max_steps=12, eval_rows=4, method="full")
    return place / "run"


def evaluate(*words):
    return CliRunner().invoke(app, ["eval", *map(str, words)], catch_exceptions=False, env={"COLUMNS": "100"})


@pytest.fixture
def scored(trained, folder):
    return json.loads(evaluate(trained, *WORDS, "--data-dir", folder, "--json").stdout)


def test_before_and_after_in_one_table_with_standard_errors(trained, folder, scored):
    told = scored[0]
    assert told["base"] != told["model"]
    assert told["before"]["mmlu_anatomy"]["num_documents"] == 5
    assert told["before"] != told["after"]
    for task, change in told["difference"].items():
        assert change["value"] == pytest.approx(told["after"][task]["value"] - told["before"][task]["value"])
        assert change["by_document"]
    lines = evaluate(trained, *WORDS, "--data-dir", folder).stdout.splitlines()
    row = next(line for line in lines if "winogrande" in line)
    before, after = (told[when]["winogrande"] for when in ("before", "after"))
    assert f"{before['value']:.3f} ± {before['stderr']:.3f}" in row
    assert f"{after['value']:.3f} ± {after['stderr']:.3f}" in row
    assert f"{told['difference']['winogrande']['value']:+.3f} ± " in row


def test_what_was_scored_is_not_computed_again(trained, folder, scored, monkeypatch):
    calls = []
    plain = Scorer.__call__
    monkeypatch.setattr(Scorer, "__call__", lambda self, *args, **more: calls.append(1) or plain(self, *args, **more))
    words = [trained, *WORDS, "--data-dir", folder, "--json"]
    assert json.loads(evaluate(*words).stdout) == scored
    assert not calls
    evaluate(*words, "--limit", "2")  # another question
    assert len(calls) == 4  # two tasks, before and after
    weights = trained / "model" / "model.safetensors"
    os.utime(weights, ns=(1, 1))  # other weights lie there now
    evaluate(*words)
    assert len(calls) == 6


def test_scores_are_in_the_summary_and_compare_shows_them(trained, scored):
    value = scored[0]["after"]["winogrande"]["value"]
    assert json.loads((trained / "summary.json").read_text())["scores"]["winogrande"] == value
    grid = make_grid({"model": "m", "data": "d", "eval_rows": 6, "max_steps": 8}, Path("cmp"))
    head, rows = table_of(results(grid, {grid.trials[0].name: read_run(trained)}, {}))
    assert f"{value:.4f}"[:5] in rows[0][head.index("winogrande")]


def test_a_model_alone_has_one_column(model_folder, folder, tmp_path):
    words = [model_folder, "--tasks", "winogrande", "--data-dir", folder, "--output", tmp_path / "scores"]
    shown = evaluate(*words).stdout
    assert "score" in shown
    assert "difference" not in shown
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["entries"][0]["task"] == "winogrande"


def test_the_error_of_a_difference_is_taken_over_documents():
    one, other = Score("acc", 0.5, 0.29, 4, values=(0, 0, 1, 1)), Score("acc", 0.5, 0.29, 4, values=(0, 1, 0, 1))
    assert difference(one, one) == {"value": 0.0, "stderr": 0.0, "by_document": True}
    assert difference(one, other)["stderr"] == pytest.approx((2 / 3) ** 0.5 / 2)
    apart = difference(Score("acc", 0.5, 0.3, 9), Score("acc", 0.6, 0.4, 9))
    assert apart == {"value": pytest.approx(0.1), "stderr": pytest.approx(0.5), "by_document": False}


def test_a_vocabulary_that_disagrees_is_refused(folder, tmp_path):
    make_llama(vocab_size=64).save_pretrained(tmp_path / "small")
    make_tokenizer().save_pretrained(tmp_path / "small")
    with pytest.raises(
        UserError, match="the tokenizer has 130 tokens, but the model only 64: give a model with its own tokenizer"
    ):
        evaluate(tmp_path / "small", "--tasks", "winogrande", "--data-dir", folder)


def test_bad_targets_are_told_of(trained, folder, tmp_path):
    with pytest.raises(UserError, match="no such model folder or file"):
        evaluate(tmp_path / "nothing", *WORDS, "--data-dir", folder)
    (tmp_path / "config.yaml").write_text("model: m\n")
    with pytest.raises(UserError, match="holds no trained model; the run is not finished"):
        evaluate(tmp_path, *WORDS, "--data-dir", folder)
    (tmp_path / "scores.json").write_text("{}")
    with pytest.raises(UserError, match="scores.json cannot be read .*: remove it to score again"):
        evaluate(trained, *WORDS, "--data-dir", folder, "--output", tmp_path)


NO_NETWORK = """
import socket, sys
def refuse(*args, **more):
    print("the network was asked for", args, file=sys.stderr)
    sys.exit(99)
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from lisatune.cli import main
main()
"""


def test_with_local_data_no_network_is_touched(model_folder, folder):
    """Although the hub is allowed: in a process of its own, where every connection ends it."""
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK, "eval", model_folder, "--tasks", "winogrande", "--data-dir", folder],
        capture_output=True, text=True, timeout=HANG_SECONDS, env=os.environ | {"HF_HUB_OFFLINE": "0", "COLUMNS": "100"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "winogrande" in done.stdout
    assert "it/s" not in done.stderr  # bars of other libraries
