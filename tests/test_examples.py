"""Every example runs, is short, and its model learns."""

import json
import sys

import pytest

from lisatune.settings import build_config, read_settings
from lisatune.train import train
from places import CHECKOUT
from torchrun import torchrun

EXAMPLES = CHECKOUT / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat and looked at the rat. " * 60)
    return path


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_under_sixty_lines(path):
    assert len(path.read_text().splitlines()) < 60


@pytest.mark.parametrize("name", ["own_loop", "hf_trainer"])
def test_loss_falls(name, model_folder, text_file):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    losses = __import__(name).main(str(model_folder), str(text_file), num_steps=12)
    assert len(losses) == 12
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_the_trainers_example_runs_on_two_processes(model_folder, text_file):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    told = torchrun(2, EXAMPLES / "hf_trainer.py", model_folder, text_file)
    assert "LISA: 2 of 4 layers train at a time" in told


@pytest.mark.filterwarnings("default")  # TRL warns of its own coming changes
def test_trl(model_folder, data_file):
    pytest.importorskip("trl", reason="the extra 'sft' is not installed")
    losses = __import__("trl_sft").main(str(model_folder), str(data_file), num_steps=12)
    assert len(losses) == 12
    assert losses[-1] < losses[0]


@pytest.fixture
def answers_file(tmp_path):
    """Questions with a good and a bad answer, and whether an answer is good."""
    rows = [
        {"prompt": f"What is {i}?", "chosen": f" It is {i}.", "rejected": " No no no.", "completion": f" It is {i}.", "label": i % 2 == 0}
        for i in range(48)
    ]  # fmt: skip
    for row in rows[1::2]:
        row["completion"] = row["rejected"]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


COLUMNS = {
    "trl_dpo": ["prompt", "chosen", "rejected"],
    "trl_kto": ["prompt", "completion", "label"],
    "trl_reward": ["prompt", "chosen", "rejected"],
    "trl_grpo": ["prompt"],
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", COLUMNS)
def test_preferences(name, model_folder, answers_file):
    pytest.importorskip("trl", reason="the extra 'sft' is not installed")
    rows = [json.loads(line) for line in answers_file.read_text().splitlines()]
    answers_file.write_text("".join(json.dumps({c: row[c] for c in COLUMNS[name]}) + "\n" for row in rows))
    told = __import__(name).main(str(model_folder), str(answers_file), num_steps=8)
    assert len(told) == 8
    if name != "trl_grpo":  # of a random model's first eight steps the reward says nothing
        assert told[-1] < told[0]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.name)
def test_recipes_train_as_they_are(path, model_folder, data_file, answers_file, tmp_path):
    """All of a recipe's settings, with a model and rows that are on this machine."""
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "%s"}\n' % ("abcdefgh " * 20) * 80)
    recipe = read_settings(str(path), [])
    is_text, is_judged = "packing" in recipe, "task" in recipe
    if is_judged:
        pytest.importorskip("trl", reason="the extra 'sft' is not installed")
    rows = text if is_text else answers_file if is_judged else data_file
    own = {"model": str(model_folder), "data": str(rows), "output": str(tmp_path / "run")}
    own |= {"dataset_config": None, "max_steps": 12, "warmup_steps": 2, "max_length": 64, "eval_rows": 16}
    own |= {"eval_data": dict.fromkeys(recipe["eval_data"], str(text))} if is_text else {}
    summary = train(build_config(recipe | own))
    assert summary["eval_loss_after"] < summary["eval_loss_before"]


def test_pubmedqa_rows_leave_the_test_questions_out(tmp_path):
    item = {
        "QUESTION": "Is it so?",
        "CONTEXTS": ["We looked.", "It was."],
        "final_decision": "yes",
        "LONG_ANSWER": "Yes.",
    }
    (tmp_path / "all.json").write_text(json.dumps({"1": item, "2": item | {"final_decision": "no"}}))
    (tmp_path / "test.json").write_text(json.dumps({"1": "yes"}))
    __import__("pubmedqa_rows").main(*(str(tmp_path / name) for name in ("all.json", "test.json", "rows.jsonl")))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows == [{"prompt": "Abstract: We looked.\nIt was.\nQuestion: Is it so?\nAnswer:", "completion": "no"}]


@pytest.mark.parametrize("path", sorted((EXAMPLES / "accelerate").glob("*.yaml")), ids=lambda p: p.name)
def test_accelerate_takes_its_settings(path):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))
    assert config.num_processes == 2
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert set(config.fsdp_config) <= known.keys()
