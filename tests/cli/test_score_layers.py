"""`lisatune score-layers`: from a model or two runs to weights that a run reads."""

import json

import pytest
import torch
from typer.testing import CliRunner

from lisatune import UserError, find_layers
from lisatune.cli.app import app
from lisatune.models.load import load_model
from lisatune.samplers.scores import input_norms, outlier_scores
from runs import metrics, run
from tiny import make_llama, make_tokenizer


def score(*words):
    done = CliRunner().invoke(app, ["score-layers", *map(str, words)], catch_exceptions=True)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


@pytest.fixture
def outlying(tmp_path):
    """A model of whose layers the last two have large weights."""
    model = make_llama(vocab_size=len(make_tokenizer()))
    for number in (2, 3):
        model.model.layers[number].mlp.up_proj.weight.data[:number] *= 40
    model.save_pretrained(tmp_path / "outlying")
    make_tokenizer().save_pretrained(tmp_path / "outlying")
    return tmp_path / "outlying"


def test_a_run_samples_by_the_scores_that_were_written(outlying, data_file, tmp_path):
    told = json.loads(score(outlying, "--multiple", 9, "--output", tmp_path / "w.json", "--json"))
    layers = find_layers(load_model(str(outlying))[0])
    assert told["scores"] == {f"layers.{i}": value for i, value in outlier_scores(layers, multiple=9).items()}
    assert json.loads((tmp_path / "w.json").read_text()) == told["scores"]
    assert {name for name, value in told["scores"].items() if value} == {"layers.2", "layers.3"}
    options = {"sampler": "weighted", "sampler_options": {"weights": str(tmp_path / "w.json")}}
    run(outlying, data_file, tmp_path / "run", num_active=1, interval_steps=1, max_steps=8, **options)
    active = {row["active_layers"][0] for row in metrics(tmp_path / "run")[1:]}
    assert active <= {2, 3}


def test_with_data_a_weight_counts_times_its_input(outlying, data_file, tmp_path):
    told = json.loads(score(outlying, "--data", data_file, "--rows", 3, "--output", tmp_path / "w.json", "--json"))
    model, tokenizer = load_model(str(outlying))
    from lisatune.data.formats import parse_row, read_rows
    from lisatune.data.tokenize import Encoder

    documents = list(Encoder(tokenizer, 1024)(parse_row(row) for row in list(read_rows(str(data_file)))[:3]))
    layers = find_layers(model)
    norms = input_norms(layers, [{"input_ids": torch.tensor([list(document.ids)])} for document in documents])
    assert told["scores"] == {f"layers.{i}": value for i, value in outlier_scores(layers, norms).items()}


def test_of_two_runs_it_is_the_papers_ratio(model_folder, data_file, tmp_path):
    pytest.importorskip("peft", reason="the extra 'lora' is not installed")
    for method in ("lora", "full"):
        run(model_folder, data_file, tmp_path / method, method=method, norm_steps=1, max_steps=3)
    text = score(tmp_path / "lora", tmp_path / "full", "--output", tmp_path / "w.json")
    assert "sampler=weighted" in text
    lora, full = (
        json.loads((tmp_path / method / "norms.jsonl").read_text().splitlines()[-1])["parts"]
        for method in ("lora", "full")
    )
    written = json.loads((tmp_path / "w.json").read_text())
    assert list(written) == [f"layers.{i}" for i in range(4)]
    for part, ratio in written.items():
        assert ratio == lora[part]["mean_norm"] / full[part]["mean_norm"]
    with pytest.raises(UserError, match="is a run with method=full: give a run of LoRA first"):
        score(tmp_path / "full", tmp_path / "lora", "--output", tmp_path / "w.json")


def test_refusals(model_folder, data_file, tmp_path):
    with pytest.raises(UserError, match="3 models were given"):
        score("a", "b", "c")
    with pytest.raises(UserError, match="--data has no effect on two runs"):
        score("a", "b", "--data", data_file)
    with pytest.raises(UserError, match=r"holds no norms\.jsonl: train with norm_steps"):
        score(tmp_path, tmp_path)
    with pytest.raises(UserError, match="every layer has the score 0"):
        score(model_folder, "--multiple", 1000, "--output", tmp_path / "w.json")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="empty.jsonl: holds no rows"):
        score(model_folder, "--data", tmp_path / "empty.jsonl", "--output", tmp_path / "w.json")
    assert not (tmp_path / "w.json").exists()
    with pytest.raises(UserError, match="cannot be written"):
        score(model_folder, "--multiple", 1, "--output", tmp_path / "no" / "w.json")
