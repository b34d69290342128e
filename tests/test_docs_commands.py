"""Every command of README and docs is run, page by page, on a tiny model; or a comment above it says why it is not.

The comment is ``<!-- not run: REASON -->``. A model, data and numbers of a page are replaced by small ones: see ``small``.
"""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

from doc_pages import PAGES, ROOT, Block, blocks
from judge_server import Server, completion
from patience import HANG_SECONDS
from small_tasks import write_tasks
from tiny import make_llama, make_tokenizer, write_rows
from typed import typed

FAST = ("docs/data.md", "docs/methods.md", "docs/training.md")  # the others take minutes together
# set-up, which a test that runs has behind it
SET_UP = {
    "pip install": "the tests' environment has it",
    "make": "`make test` and `make test-slow` run it",
    ". ": "the tests' environment is active",
    "cp ": "the files are there",
}
MODELS = ("MODEL", "M", "model.gguf", "HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct")
STAND_IN = dict.fromkeys(MODELS, "model") | dict.fromkeys(("ROWS", "D"), "rows.jsonl") | {"RUN": "runs/RUN"}
SMALL = {
    "max_steps": "2", "eval_rows": "4", "max_length": "64", "per_device_train_batch_size": "2", "seed": "0", "norm_steps": "1",
    "eval_tasks_steps": "1", "eval_limit": "1", "eval_steps": "1", "num_train_epochs": "0.1", "dp_shard_size": "2", "trials": "2", "--nproc": "2", "--nproc-per-node": "2", "profile_steps": "1",
}  # fmt: skip
# what is added to a command that does not say it
ADDED = {
    "train": ["max_steps=4", "per_device_train_batch_size=2"], "chat": ["--max-new-tokens", "2"],
    "eval": ["--data-dir", "data", "--limit", "1"], "mt-bench": ["--max-new-tokens", "2"],
    "compare": ["max_length=64", "per_device_train_batch_size=2"],
}  # fmt: skip
# runs that a page takes for granted
BEFORE = {"docs/use.md": ["a"], "docs/eval.md": ["a"], "docs/mt_bench.md": ["lisa", "lora", "full"]}


def id_of(path):
    return str(path.relative_to(ROOT))


def small(line, number, judge_url):
    """The words of a command with a tiny model, short runs and few values.

    A grid keeps the first of its values, and ``...`` stands for model, data and, if it is not given, output.
    """
    words = shlex.split(line)
    program = words.index("lisatune") + 1
    command = words[program] if len(words) > program else ""
    if "..." in words:
        output = [] if "--output" in words else ["--output", f"runs/{number}"]
        words[words.index("...") : words.index("...") + 1] = ["--model", "model", "--data", "rows.jsonl", *output]
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if equals and name in SMALL:
            words[i] = f"{name}={SMALL[name]}"
        elif equals and name.endswith("learning_rate") and "search=optuna" not in line:  # which needs a range
            words[i] = f"{name}={value.partition(',')[0]}"
        elif word == "--judge-url":
            words[i + 1] = judge_url
        elif word in SMALL:
            words[i + 1] = SMALL[word]
        words[i] = STAND_IN.get(words[i], words[i]).replace("org/name", "folder")
    given = {word.partition("=")[0] for word in words}
    added = ADDED.get(command, [])
    if added and added[0].startswith("--"):
        pairs = zip(added[::2], added[1::2], strict=True)
        return words + [word for pair in pairs if pair[0] not in given for word in pair]
    if "num_train_epochs" in given:
        given.add("max_steps")  # one of them says how long a run is
    return words + [word for word in added if word.partition("=")[0] not in given]


def run(line, number, folder, judge_url, monkeypatch):
    """Run a command of a page in ``folder``; in this process where it starts no others and leaves no connection open."""
    if line.startswith(tuple(SET_UP)):
        return
    if line.split()[0] == "ls":
        subprocess.run(line, shell=True, check=True, cwd=folder)
        return
    words = small(line, number, judge_url)
    if words[0] == "lisatune" and words[1] != "mt-bench" and not (words[1] == "train" and "--nproc" in words):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\n"))
        done = typed(*words[1:], cwd=folder)
    else:
        program = ["-m", "torch.distributed.run", *words[1:]] if words[0] == "torchrun" else ["-m", *words]
        done = subprocess.run(
            [sys.executable, *program], cwd=folder, capture_output=True, text=True, timeout=HANG_SECONDS,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stderr}"


@pytest.fixture(scope="module")
def at_hand(model_folder, tmp_path_factory):
    """A folder with what pages name: a model, data, tasks, questions."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(model_folder, folder / "model")
    make_llama(vocab_size=len(make_tokenizer()), max_position_embeddings=2048).save_pretrained(folder / "model")
    for name in ("rows.jsonl", "a.jsonl", "folder/main/train.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(folder / name)
    shutil.copytree(ROOT / "examples", folder / "examples")
    pair = {"prompt": "What is 1 + 1?", "chosen": "2", "rejected": "3"}
    (folder / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 12)
    tool = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
    (folder / "tools.json").write_text(json.dumps([{"type": "function", "function": tool}]))
    (folder / "data").mkdir()
    write_tasks(folder / "data")
    (folder / "question.jsonl").write_text(
        '{"question_id": 1, "category": "math", "turns": ["1 + 1?", "And 2 + 2?"]}\n'
    )
    (folder / "gpt-4.jsonl").write_text('{"question_id": 1, "choices": [{"turns": ["2", "4"]}]}\n')
    return folder


def cases():
    return [
        pytest.param(path, id=id_of(path), marks=[] if id_of(path) in FAST else pytest.mark.slow)
        for path in PAGES
        if any(block.is_run and block.language not in ("python", "diff") for block in blocks(path.read_text()))
    ]


@pytest.mark.parametrize("path", cases())
def test_commands_of_a_page_run_in_their_order(path, at_hand, tmp_path, monkeypatch):
    folder = shutil.copytree(at_hand, tmp_path / "reader")
    with Server(lambda number, body: completion("[[5]]")) as server:
        for name in BEFORE.get(id_of(path), []):
            run(f"lisatune train --model M --data D --output runs/{name}", 0, folder, server.url, monkeypatch)
        for block in blocks(path.read_text(encoding="utf-8")):
            if block.is_run and block.language not in ("python", "diff"):
                for number, line in enumerate(block.lines, start=block.line):
                    run(line, number, folder, server.url, monkeypatch)


@pytest.mark.parametrize("path", PAGES, ids=id_of)
def test_every_command_can_be_run_or_says_why_it_is_not(path):
    known = ("lisatune", "torchrun", "ls", *SET_UP)
    bad = [f"line {block.line}: {line}" for block in blocks(path.read_text(encoding="utf-8")) if block.is_run
           for line in block.lines if block.language not in ("python", "diff") and not line.startswith(known)]  # fmt: skip
    assert bad == [], "put <!-- not run: REASON --> and an empty line above the block, or teach run() of this file"


def test_python_of_the_readme_trains(llama):
    """The loop of the README, as it is after the change."""
    (block,) = [block for block in blocks((ROOT / "README.md").read_text()) if block.language == "diff"]
    ids = torch.randint(128, (2, 16))
    loader = [{"input_ids": ids, "labels": ids}] * 3
    before = {name: p.clone() for name, p in llama.named_parameters()}
    exec("\n".join(line[1:] for line in block.lines), {"torch": torch, "model": llama, "loader": loader})
    moved = {
        name.split(".")[2]
        for name, p in llama.named_parameters()
        if not torch.equal(p, before[name]) and ".layers." in name
    }
    assert len(moved) == 2


def test_a_block_is_read_with_its_reason():
    page = "# A\n\n    lisatune train \\\n        a=1   # why\n\n<!-- not run: needs a GPU -->\n\n    make x\n\n```text\nmake y\n```\n"
    first, second, third = blocks(page)
    assert first == Block(3, "", ("lisatune train         a=1  ",), "") or first.lines[0].split() == [
        "lisatune",
        "train",
        "a=1",
    ]
    assert (first.is_run, second.why_not_run, second.is_run) == (True, "needs a GPU", False)
    assert (third.language, third.lines) == ("text", ("make y",))
