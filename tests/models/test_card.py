"""The model card that a run leaves with its model."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard

from lisatune.models.card import model_card, on_hub
from lisatune.run.finish import scores_before
from lisatune.settings import build_config
from runs import metrics, run, weights

SUMMARY = {
    "steps": 1200, "tokens": 3400, "train_seconds": 5678.9, "eval_loss_before": 2.0, "eval_loss_after": 1.5,
    "peak_bytes": 3 * 2**30, "base_bytes": 2**30, "planned_peak_bytes": 2**31, "scores": {"gsm8k": 0.25, "new": 0.5},
}  # fmt: skip


def card(summary=SUMMARY, data=(), **settings):
    given = {"model": "org/base", "data": "org/rows", "output": "runs/a", "eval_rows": 4} | settings
    return model_card(
        build_config(given), summary, data=data, versions={"torch": "2.0"}, scores_before={"gsm8k": 0.125}
    )


def body(text):
    return text.split("\n---\n", 1)[1]


def test_numbers_before_and_after_and_what_they_cost():
    text = body(card(data=[("org/rows", "60 rows")]))
    for line in (
        "# a",
        "| org/rows | 60 rows |",
        "| held-out loss | 2.0000 -> 1.5000 (perplexity 7.389 -> 4.482) |",
        "| gsm8k | 0.125 -> 0.25 |",
        "| new | not measured -> 0.5 |",
        "| steps | 1,200 |",
        "| time | 5,679 s |",
        "| peak memory | the process held 3.00 GiB, 1.00 GiB of it before training; predicted for tensors alone: 2.00 GiB |",
        "| torch | 2.0 |",
    ):
        assert line in text.splitlines()
    counted = body(card(SUMMARY | {"tensor_peak_bytes": 2**30}))
    assert "| peak memory | 1.00 GiB of tensors (predicted: 2.00 GiB); the process held 3.00 GiB, " in counted


def test_the_hub_reads_the_metadata():
    data = ModelCard(card(data=[("org/rows", ""), ("org/rows", ""), ("org/more", "")])).data
    assert (data.base_model, data.datasets) == ("org/base", ["org/rows", "org/more"])
    assert (data.library_name, data.tags) == ("transformers", ["lisatune", "lisa"])


def test_paths_of_this_machine_are_neither_shown_nor_taken_for_names_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    text = card(
        model=str(tmp_path), data=[("rows.jsonl", "")], output=f"{tmp_path}/own", eval_data={"math": f"{tmp_path}/rows.jsonl"}
    )  # fmt: skip
    assert str(tmp_path.parent) not in text
    found = ModelCard(text).data
    assert (found.base_model, found.datasets) == (None, None)
    assert "    eval_data:\n      math: rows.jsonl\n" in text
    assert not on_hub("rows.jsonl")


@pytest.mark.parametrize("name", ["a](http:evil) <img src=x> | b", "x\n---\ntags: [evil]\n---", "```\n# evil"])
def test_a_name_is_text_and_nothing_else(name):
    line = " ".join(name.split())  # settings cannot hold a line break
    text = card(data=[(name, name)], output=f"runs/{line}", columns={line: line})
    assert ModelCard(text).data.tags == ["lisatune", "lisa"]
    shown = "\n".join(row for row in body(text).splitlines() if not row.startswith("    "))  # the rest is code
    for sign in ("a](http", "<img", "x> | b", "\n---", "\ntags:", "\n```", "\n# evil"):
        assert sign not in shown
    assert "evil" in shown


def test_the_settings_that_were_given_are_listed_and_repeat_the_run():
    text = card(learning_rate=1e-3, max_steps=12)
    block = text.split("## Settings")[1].split("## Versions")[0]
    given = yaml.safe_load("\n".join(line for line in block.splitlines() if line.startswith("    ")))
    assert given["learning_rate"] == 1e-3
    assert "seed" not in given
    again = build_config(given | {"output": "runs/a"})
    assert again == build_config(
        {"model": "org/base", "data": "org/rows", "output": "runs/a", "eval_rows": 4, "learning_rate": 1e-3, "max_steps": 12}
    )  # fmt: skip


def test_a_run_leaves_a_card_and_a_resumed_run_too(model_folder, data_file, tmp_path):
    summary, _ = run(model_folder, data_file, tmp_path / "whole", max_steps=4)
    text = (tmp_path / "whole" / "model" / "README.md").read_text()
    ModelCard(text)
    assert f"{summary['eval_loss_before']:.4f} -> {summary['eval_loss_after']:.4f}" in text
    assert "| rows.jsonl | 54 rows, " in text
    assert str(data_file.parent) not in text
    run(model_folder, data_file, tmp_path / "two", max_steps=4, stop_after=2)
    assert not (tmp_path / "two" / "model").exists()
    run(model_folder, data_file, tmp_path / "two", max_steps=4, resume=True)
    results = "## Results", "## Cost"
    one, two = (
        (tmp_path / name / "model" / "README.md").read_text().partition(results[0])[2].partition(results[1])[0]
        for name in ("whole", "two")
    )
    assert one == two != ""
    assert metrics(tmp_path / "whole")[0]["eval_loss"] == summary["eval_loss_before"]
    for name, weight in weights(tmp_path / "whole").items():
        assert weight.equal(weights(tmp_path / "two")[name])


@pytest.mark.parametrize(
    ("line", "found"),
    [(json.dumps({"step": 0, "scores": {"t": 0.5}}), {"t": 0.5}), ('{"step": 0}', {}), ("no JSON", {})],
)
def test_scores_before_are_those_of_the_first_line(tmp_path, line, found):
    (tmp_path / "metrics.jsonl").write_text(line + '\n{"step": 1, "scores": {"t": 1.0}}\n')
    assert scores_before(tmp_path) == found
