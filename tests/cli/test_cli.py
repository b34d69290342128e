"""The command as a user types it: in a process of its own, or in this one where only its words matter."""

import json
import os
import subprocess
import sys

import pytest

from lisatune.cli.app import app
from patience import HANG_SECONDS
from typed import typed


def lisatune(*words, cwd=None, **environment):
    path = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, "-m", "lisatune", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "PYTHONPATH": path} | environment,
        timeout=HANG_SECONDS,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def refused(model_folder, data_file, tmp_path):
    """Runs ``lisatune train`` with one thing wrong and checks that it is refused as it should be."""

    def check(*words, model=model_folder, data=data_file, output=tmp_path / "run"):
        # an import of torch or transformers fails here: a refusal must not wait for them
        (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
        before = sorted(tmp_path.rglob("*"))
        done = lisatune("train", "--model", model, "--data", data, "--output", output, *words, PYTHONPATH=str(tmp_path))
        assert done.returncode == 2, done
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("lisatune: ")
        assert done.stderr.count("\n") == 1
        assert sorted(p for p in tmp_path.rglob("*") if "__pycache__" not in p.parts) == before
        return done.stderr

    return check


def test_missing_file(refused, tmp_path):
    assert "rows.jsnl: no such file or folder; did you mean 'rows.jsonl'?" in refused(data=tmp_path / "rows.jsnl")


def test_malformed_json_at_line_n(refused, data_file):
    with data_file.open("a") as file:
        file.write('{"prompt": "x", "completion"}\n')
    assert "rows.jsonl, line 61, column 29: not valid JSON" in refused()


def test_unknown_columns(refused, data_file):
    data_file.write_text('{"q": "x", "a": "y"}\n')
    assert "rows.jsonl, line 1: columns q, a are not recognised; expected messages; prompt" in refused()


def test_empty_data_set(refused, data_file):
    data_file.write_text("")
    assert "holds no rows" in refused()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("num_active=0", "num_active is 0, so no decoder layer would ever train"),
        ("num_active=5", "num_active is 5, but the model has 4 decoder layers"),
        ("interval_steps=0", "interval_steps=0: input should be greater than or equal to 1"),
        ("learning_rat=1", "unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        ("learning_rate", "'learning_rate' is not of the form key=value"),
        ("eval_rows=60", "eval_rows=60 leaves nothing of the 60 rows"),
    ],
)
def test_bad_settings(refused, word, message):
    assert message in refused(word)


def test_misspelt_key_in_the_config_file(refused, tmp_path):
    (tmp_path / "run.yaml").write_text("intervall_steps: 3\n")
    assert "unknown setting 'intervall_steps'; did you mean 'interval_steps'?" in refused(
        "--config", tmp_path / "run.yaml"
    )


def test_model_folder_that_is_no_model(refused, tmp_path):
    (tmp_path / "nothing").mkdir()
    assert "holds no config.json, so it is no Hugging Face model" in refused(model=tmp_path / "nothing")
    assert "no such model folder or file" in refused(model=tmp_path / "nowhere")


def test_output_that_already_holds_a_run(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("precious")
    assert "already holds a run that was stopped before its first checkpoint: add --resume to resume it" in refused()
    assert (tmp_path / "run" / "config.yaml").read_text() == "precious"


def test_output_that_cannot_be_made(refused, data_file):
    assert "cannot be made in" in refused(output=data_file / "run")


def test_broken_weights_are_a_sentence_too(data_file, tmp_path, model_folder):
    import shutil

    shutil.copytree(model_folder, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"not weights")
    done = typed("train", "--model", tmp_path / "broken", "--data", data_file, "--output", tmp_path / "run")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "cannot be loaded as a causal language model" in done.stderr


def test_train_chat_and_report(model_folder, data_file, tmp_path):
    """The main job, typed: train, speak with the result, read its numbers."""
    done = lisatune(
        "train", "--model", model_folder, "--data", data_file, "--output", "run", "--json", "max_steps=4", "eval_rows=4",
        "max_length=64", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 4
    assert "\nstep 4/4  loss " in done.stderr
    answer = lisatune("chat", "run", "--prompt", "What is 1 plus 1?", "--max-new-tokens", 4, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    talk = subprocess.run(
        [sys.executable, "-m", "lisatune", "chat", "run", "--max-new-tokens", "4"],
        input="Hello\n\n", capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert talk.returncode == 0, talk.stderr
    again = typed("train", "--config", "run/config.yaml", "--output", "run2", "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["eval_loss_after"] == json.loads(done.stdout)["eval_loss_after"]


def test_help_lists_every_command_without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "transformers.py").write_text("raise SystemExit('transformers was imported')")
    done = lisatune("--help", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        assert name in done.stdout
        assert lisatune(name, "--help", PYTHONPATH=str(tmp_path)).returncode == 0
    listed = json.loads(lisatune("settings", "--json", PYTHONPATH=str(tmp_path)).stdout)
    assert {"name": "num_active", "default": 2}.items() <= next(s for s in listed if s["name"] == "num_active").items()


def test_plan_puts_methods_side_by_side_and_finds_what_fits(model_folder):
    words = ["plan", "--model", model_folder / "config.json", "max_length=64", "--device", "cpu"]
    done = typed(*words)
    assert done.returncode == 0, done.stderr
    for expected in ("lisa", "lora", "full", "weights, embedding", "optimizer state, head", "peak", "█", "not counted"):
        assert expected in done.stdout
    plans = json.loads(typed(*words, "--json").stdout)["plans"]
    assert [p["method"] for p in plans] == ["lisa", "lora", "full"]
    assert all(p["peak_bytes"] == sum(p["bytes_of"].values()) for p in plans)
    budget = plans[0]["peak_bytes"] - 1
    fits = typed(*words, "--method", "lisa", "--gpu-memory", f"{budget / 2**30:.9f}GiB", "--json")
    told = json.loads(fits.stdout)
    assert told["levers"][0]["lever"] == ""
    assert told["levers"][-1]["plan"]["peak_bytes"] <= told["budget"]
    assert told["reach"]["active slices"] >= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu-memory", "1KiB"], "nothing fits into 0.0 MiB"),
        (["--gpu-memory", "much"], "'much' is not an amount of memory: write it as 24GiB or 24GB"),
        (["--method", "lsia"], "method='lsia': input should be 'lisa', 'fixed', 'badam', 'lora', 'full' or 'mezo'"),
        (["--device", "tpu"], "device=tpu: choose cuda, mps or cpu"),
        (["--method", "lora", "vocabulary_blocks=true"], "vocabulary_blocks has no effect with method=lora"),
    ],
)
def test_plans_that_cannot_be(model_folder, words, message):
    done = typed(
        "plan", "--model", model_folder, "max_length=64", *([] if "--device" in words else ["--device", "cpu"]), *words
    )
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert message in done.stderr.splitlines()[-1]


def test_plan_of_nothing():
    done = typed("plan")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "model is missing: give --model" in done.stderr
    assert "no such model folder or file" in typed("plan", "--model", "./nowhere").stderr


def test_train_fit_pulls_levers_and_tells_what_came_of_it(model_folder, data_file, tmp_path):
    plan = typed(
        "plan",
        "--model",
        model_folder,
        "--device",
        "cpu",
        "--method",
        "lisa",
        "max_length=64",
        "recipe=paper",
        "--json",
    )
    budget = json.loads(plan.stdout)["plans"][0]["peak_bytes"] - 1
    words = ["train", "--model", model_folder, "--data", data_file, "max_steps=3", "max_length=64", "packing=true",
             "recipe=paper"]  # fmt: skip
    done = lisatune(*words, "--output", tmp_path / "a", "--fit", f"{budget / 2**30:.9f}GiB")
    assert done.returncode == 0, done.stderr
    assert "to fit into" in done.stderr
    assert "predicted" in done.stderr.split("memory")[-1]
    used = (tmp_path / "a" / "config.yaml").read_text()
    assert "optim: adamw_8bit" in used
    refused = typed(*words, "--output", tmp_path / "b", "--fit", "1KiB")
    assert refused.returncode == 2
    assert "nothing fits into" in refused.stderr
    assert not (tmp_path / "b").exists()


def test_library_needs_torch_and_transformers_alone():
    code = (
        "import sys\n"
        "for name in 'peft trl datasets accelerate matplotlib gguf pydantic'.split(): sys.modules[name] = None\n"
        "import torch; from transformers import LlamaConfig, LlamaForCausalLM\n"
        "from lisatune import find_layers, UniformSampler, LisaEngine, LisaCallback\n"
        "model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32,"
        " num_hidden_layers=2, num_attention_heads=2))\n"
        "engine = LisaEngine(find_layers(model), UniformSampler(2, 1))\n"
        "engine.begin_step(0, torch.optim.AdamW(model.parameters()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_person_is_asked_whether_to_go_on(model_folder, data_file, tmp_path):
    """In a terminal of its own; what is answered decides."""
    import pty

    output = tmp_path / "run"
    words = [
        "--model",
        model_folder,
        "--data",
        data_file,
        "--output",
        output,
        "max_steps=4",
        "max_length=64",
        "num_active=1",
    ]
    command = [sys.executable, "-m", "lisatune", "train", *map(str, words)]
    (output / "checkpoints").mkdir(parents=True)
    assert typed("train", *words[:4], "--output", tmp_path / "other", *words[6:]).returncode == 0
    (output / "config.yaml").write_text((tmp_path / "other" / "config.yaml").read_text())

    def answer(text):
        ours, theirs = pty.openpty()
        os.write(ours, text.encode())
        environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
        done = subprocess.run(
            command, stdin=theirs, capture_output=True, text=True, env=environment, timeout=HANG_SECONDS
        )
        os.close(ours)
        os.close(theirs)
        return done

    refused = answer("n\n")
    assert "holds a run that was stopped before its first checkpoint. Resume it? [Y/n]" in refused.stderr
    assert refused.returncode == 2
    accepted = answer("y\n")
    assert accepted.returncode == 0, accepted.stderr
    assert "no checkpoint was written yet: the run starts from the beginning" in accepted.stderr
    assert (output / "summary.json").exists()


@pytest.mark.parametrize(
    ("text", "setting"),
    [("100 steps", "save_steps: 100"), ("2.5minutes", "save_minutes: 2.5"), ("1 step", "save_steps: 1")],
)
def test_periods(model_folder, data_file, tmp_path, text, setting):
    from lisatune.cli.train import parse_period
    from lisatune.settings import build_config, write_config

    needed = {"model": "m", "data": "d", "output": "o"}
    write_config(build_config(needed | parse_period(text)), tmp_path / "config.yaml")
    assert setting in (tmp_path / "config.yaml").read_text().splitlines()


def test_what_is_no_period(refused):
    assert "--save-every '10' is not a period: write for example '100 steps'" in refused("--save-every", "10")
    assert "--allow-changes has no effect without --resume" in refused("--allow-changes")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "m", "--data", "d", "eval_rows=1"], "output is missing: give --output"),
        (["--output", "cmp", "model=m", "data=d", "eval_rows=1", "learning_rat=1,2"], "did you mean 'learning_rate'?"),
        (["--output", "cmp", "model=m", "data=d"], "a comparison needs held-out rows"),
        (["--output", "cmp", "model=m", "data=d", "eval_rows=1", "data=a,b"], "a,b: no such file or folder"),
    ],
)
def test_comparisons_that_cannot_be(words, message, tmp_path, model_folder):
    words = [word.replace("model=m", f"model={model_folder}") for word in words]
    done = typed("compare", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "cmp").exists()
