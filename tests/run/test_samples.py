"""``samples``: answers while a run trains, which change none of its bits and are resumed without doubled lines."""

import json

import pytest
import torch

from lisatune import UserError
from lisatune.models.chat import Chat
from lisatune.models.load import load_model
from runs import metrics, run, weights

PROMPTS = ["What is 1 plus 1?", "What is <b>2</b> plus 2?"]
SOME = {"eval_steps": 3, "max_steps": 8, "gradient_checkpointing": True}


@pytest.fixture
def tmp_path(memory_path, monkeypatch):
    monkeypatch.setattr("lisatune.run.samples.MAX_NEW_TOKENS", 6)
    return memory_path


def lines(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_answers_are_written_at_each_evaluation_and_change_nothing(model_folder, data_file, tmp_path):
    run(model_folder, data_file, tmp_path / "plain", **SOME)
    _, said = run(model_folder, data_file, tmp_path / "asked", samples=PROMPTS, **SOME)
    a, b = weights(tmp_path / "plain"), weights(tmp_path / "asked")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert metrics(tmp_path / "plain")[1:] == metrics(tmp_path / "asked")[1:]
    found = lines(tmp_path / "asked")
    assert [(line["step"], line["prompt"]) for line in found] == [(s, p) for s in (0, 3, 6, 8) for p in PROMPTS]
    assert all(line.keys() == {"step", "prompt", "answer"} for line in found)
    for line, folder in [(found[0], model_folder), (found[-2], tmp_path / "asked" / "model")]:
        model, tokenizer = load_model(str(folder))
        tokenizer.chat_template = load_model(str(tmp_path / "asked" / "model"))[1].chat_template
        assert line["answer"] == Chat(model, tokenizer, max_new_tokens=6).ask(line["prompt"])
    assert found[0]["answer"] != found[-2]["answer"]
    assert f"step 6: {PROMPTS[0]} -> " in said

    # in the report, as text
    page = (tmp_path / "asked" / "report.html").read_text()
    assert "Answers while training" in page
    assert "What is &lt;b&gt;2&lt;/b&gt; plus 2?" in page
    assert "<b>2</b>" not in page

    # stopped after an evaluation that no checkpoint has, and resumed
    run(model_folder, data_file, tmp_path / "stopped", 4, samples=PROMPTS, **SOME)
    with (tmp_path / "stopped" / "samples.jsonl").open("a") as file:
        file.write(
            json.dumps({"step": 6, "prompt": PROMPTS[0], "answer": "of a step that is taken again"}) + "\n" + '{"st'
        )
    run(model_folder, data_file, tmp_path / "stopped", resume=True, samples=PROMPTS, **SOME)
    assert lines(tmp_path / "stopped") == found


def test_one_prompt_is_a_word_and_needs_no_held_out_rows(model_folder, data_file, tmp_path):
    some = {"eval_rows": None, "eval_steps": 1, "max_steps": 2}
    run(model_folder, data_file, tmp_path / "run", samples="Hello", **some)
    assert [(line["step"], line["prompt"]) for line in lines(tmp_path / "run")] == [(s, "Hello") for s in (0, 1, 2)]


def test_a_prompt_that_a_table_of_positions_has_no_room_for_is_refused(data_file, tmp_path, tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=len(tokenizer), n_positions=70, n_embd=16, n_layer=1, n_head=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"samples: a prompt may have 64 tokens with this model, so leave 'aaa"):
        run(tmp_path / "model", data_file, tmp_path / "run", samples=["a" * 90], num_active=1)
