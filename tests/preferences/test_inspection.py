"""``lisatune data`` of judged rows shows what TRL's trainer takes of them: the same tokens, and the same rows left out."""

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lisatune.cli.app import app
from lisatune.run.preflight import preflight
from lisatune.settings import build_config
from tiny import make_llama, make_tokenizer

pytest.importorskip("trl", reason="the extra 'sft' is not installed")
from lisatune.preferences.build import build_task

pytestmark = pytest.mark.filterwarnings("default")  # TRL warns of its own coming changes
LENGTHS = (2, 1, 30, 40, 15, 3)
LEFT_OUT = {
    "dpo": {"the prompt fills max_length": 2}, "kto": {"the prompt fills max_length": 2}, "orpo": {},
    "reward": {"longer than max_length": 3},
}  # fmt: skip
MAX_LENGTH = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    make_llama(vocab_size=len(make_tokenizer())).save_pretrained(folder / "m")
    make_tokenizer().save_pretrained(folder / "m")
    answers = [{"prompt": "q" * n, "chosen": "yes" * (1 + n % 4), "rejected": "no", "score": 1} for n in LENGTHS]
    rows = {"pairs": answers, "judged": [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(answers)
    ]}  # fmt: skip
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


def data(folder, task, *words):
    rows = folder / ("judged.jsonl" if task == "kto" else "pairs.jsonl")
    given = [
        f"task={task}",
        f"max_length={MAX_LENGTH}",
        "per_device_train_batch_size=2",
        "eval_rows=1",
        "shuffle=false",
    ]
    done = CliRunner().invoke(app, ["data", str(rows), "--model", str(folder / "m"), *given, *words])
    assert done.exit_code == 0, done.output
    return done.stdout


def taken(folder, task):
    """Tokens and labels of each answer, as the trainer's own collator makes them of one row at a time."""
    rows = str(folder / ("judged.jsonl" if task == "kto" else "pairs.jsonl"))
    config = build_config({
        "task": task, "model": str(folder / "m"), "data": rows, "output": str(folder / "none"), "max_length": MAX_LENGTH,
        "per_device_train_batch_size": 2, "eval_rows": 1, "shuffle": False, "max_steps": 1, "num_active": 1,
    })  # fmt: skip
    trainer = build_task(config, *preflight(config), console=Console(file=io.StringIO())).trainer
    found = []
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        if task == "orpo":
            both = [(batch[f"{name}_input_ids"], batch[f"{name}_labels"]) for name in ("chosen", "rejected")]
            found += [(ids[0].tolist(), labels[0].tolist()) for ids, labels in both]
            continue
        for i, (ids, there) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
            learned = batch["completion_mask"][i] if task != "reward" else there
            labels = [token if mark else -100 for token, mark in zip(ids.tolist(), learned.tolist(), strict=True)]
            found.append(
                (ids[there.bool()].tolist(), [v for v, here in zip(labels, there.tolist(), strict=True) if here])
            )
    return found


@pytest.mark.parametrize("task", LEFT_OUT)
def test_what_is_shown_is_what_the_trainer_takes(task, folder):
    found = json.loads(data(folder, task, "--json", "--ids"))
    shown = [(row["ids"], row["labels"]) for row in found["rows"]]
    expected = taken(folder, task)
    if task == "reward":  # whose whole text is read; the answers are marked, which differ
        assert all(set(labels) - {-100} and labels[0] == -100 for _, labels in shown)
        shown, expected = ([ids for ids, _ in some] for some in (shown, expected))
    assert shown == expected
    counts = found["counts"]
    assert counts["reasons"] == LEFT_OUT[task]
    assert counts["used"] + counts["refused"] == counts["read"] == 5
    assert counts["not_used"] == ({} if task == "kto" else {"score": 5})
    assert counts["truncated"] == {"dpo": 1, "kto": 1, "orpo": 3, "reward": 0}[task]
    assert found["held_out"][0]["counts"]["read"] == 1
    answers = ["completion"] if task == "kto" else ["chosen", "rejected"]
    assert [row["answer"] for row in found["rows"]] == answers * counts["used"]
    assert [row.get("label") for row in found["rows"]][:2] == ([False, True] if task == "kto" else [None] * 2)
    assert found["rows"][0]["where"].endswith("line 2")


def test_a_terminal_and_a_page_say_which_answer_it_is(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "100")
    text = data(folder, "dpo", "--rows", "1")
    assert "line 2: chosen" in text
    assert "line 2: rejected" in text
    assert "⟦no</s>" in text
    assert "refused: the prompt fills max_length" in text
    assert "packing" not in text
    data(folder, "kto", "--html", str(tmp_path / "rows.html"))
    assert "line 5: completion, good" in (tmp_path / "rows.html").read_text()
