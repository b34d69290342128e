"""`lisatune data` as people run it: in a terminal, for a program, as a page."""

import json

import pytest
from typer.testing import CliRunner

from chat_templates import CHATML, make_tokenizer
from lisatune.cli.app import app
from tiny import make_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and a folder of data with a split to leave out and some rows that cannot be used."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = make_tokenizer(CHATML)
    make_llama(vocab_size=len(tokenizer)).save_pretrained(folder / "m")
    tokenizer.save_pretrained(folder / "m")
    (folder / "rows").mkdir()
    rows = [{"prompt": f"What is {i}?", "completion": "It is " + "so " * i, "id": i} for i in range(24)]
    rows[5]["completion"] = ""
    for name, some in (("train", rows), ("test", rows[:3])):
        (folder / "rows" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (folder / "rows" / "notes.txt").write_text("x")
    return folder


def data(folder, *words):
    done = CliRunner().invoke(
        app, ["data", str(folder / "rows"), "--model", str(folder / "m"), "max_length=90", *words]
    )
    assert done.exit_code == 0, done.output
    return done.stdout


def test_one_object_tells_files_counts_and_rows(folder):
    found = json.loads(data(folder, "--json", "--ids"))
    (read,) = found["files"]["read"]
    assert (read["file"].endswith("train.jsonl"), read["rows"], read["split"]) == (True, 24, "train")
    left_out = {file["file"].rsplit("/")[-1]: (file["reason"], file["rows"]) for file in found["files"]["left_out"]}
    assert left_out == {"test.jsonl": ("split test", 3), "notes.txt": ("not a file of rows", None)}
    counts = found["counts"]
    assert (counts["read"], counts["used"], counts["reasons"]) == (24, 23, {"the answer is empty": 1})
    assert counts["not_used"] == {"id": 23}
    lengths = found["lengths"]
    assert sum(count for _, _, count in lengths["histogram"]) == 23
    assert counts["truncated"] == sum(count for first, _, count in lengths["histogram"] if first > 90) > 0
    assert len(found["rows"]) == 23  # fewer than could be shown
    row = found["rows"][1]
    assert row["where"].endswith("line 2")
    context, answer = row["pieces"]
    assert context == ["<|im_start|>user\nWhat is 1?<|im_end|>\n<|im_start|>assistant\n", False]
    assert answer == ["It is so <|im_end|>", True]
    assert [label for label in row["labels"] if label != -100] == row["ids"][-len("It is so ") - 1 :]


def test_what_is_held_out_is_told(folder):
    found = json.loads(data(folder, "--json", "eval_rows=4"))
    assert [(held["name"], held["counts"]["read"]) for held in found["held_out"]] == [("", 4)]
    assert found["counts"]["read"] == 20
    found = json.loads(data(folder, "--json", f"eval_data={{a: {{path: {folder / 'rows'}, split: test}}}}"))
    assert [(held["name"], held["counts"]["used"]) for held in found["held_out"]] == [("a", 3)]
    assert "split test" in found["held_out"][0]["data"]
    assert "held out a" in data(folder, f"eval_data={{a: {{path: {folder / 'rows'}, split: test}}}}")


def test_files_are_told_by_their_place_in_the_folder_and_what_was_saved_to_disk_too(folder, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra 'data' is not installed")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}]).save_to_disk(tmp_path / "saved")
    (tmp_path / "rows" / "train").mkdir(parents=True)
    (tmp_path / "rows" / "train" / "part.jsonl").write_text('{"text": "three"}\n')
    words = [
        "data",
        f"[{{path: {tmp_path / 'saved'}, share: 1}}, {{path: {tmp_path / 'rows'}, share: 1}}]",
        "--model",
        str(folder / "m"),
    ]
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert [(file["rows"], file["split"]) for file in found["files"]["read"]] == [(2, "train"), (1, "train")]
    text = CliRunner().invoke(app, words).stdout
    assert "train/part.jsonl" in text
    assert "saved " in text


def test_a_terminal_without_colours_has_marks_around_what_is_learned(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = data(folder, "--rows", "2")
    assert "⟦It is <|im_end|>⟧" in text
    assert "left out: split test" in text
    assert "refused: the answer is empty" in text
    assert "have id, which is not used" in text
    assert "max_length=90" in text
    assert text.count("╭") == 2


def test_a_page_shows_every_row_with_its_text_escaped(folder, tmp_path):
    page = tmp_path / "rows.html"
    data(folder, "--html", str(page))
    text = page.read_text()
    assert text.count("<div class=row>") == 23
    assert "<span class=learned>It is so <span class=special>&lt;|im_end|&gt;</span></span>" in text
    assert "max_length 90" in text
    assert "left out: split test" in text
