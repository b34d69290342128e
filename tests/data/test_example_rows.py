"""The data sets of a run and the rows held out of them."""

import json

import pytest

from lisatune import UserError
from lisatune.data.examples import read_examples
from lisatune.settings import build_config


@pytest.fixture
def folder(tmp_path):
    for name, number in [("train.jsonl", 40), ("test.jsonl", 10), ("validation.jsonl", 20)]:
        (tmp_path / name).write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(number)))
    return tmp_path


def read(folder, **settings):
    return read_examples(build_config({"model": "m", "data": str(folder), "output": "o"} | settings))


def test_a_share_of_the_rows_is_held_out(folder):
    (train,), held_out = read(folder, eval_rows=0.1)
    assert (len(train), len(held_out[""])) == (36, 4)
    with pytest.raises(UserError, match=r"eval_rows=1.5: give a number of rows, or a share below 1"):
        read(folder, eval_rows=1.5)
    with pytest.raises(UserError, match="leaves nothing of the 40 rows"):
        read(folder, eval_rows=40)


def test_held_out_data_have_a_split_and_a_number_of_rows(folder):
    _, held_out = read(folder, eval_data=str(folder))
    assert [example.text for example in held_out[""]][:1] == ["test.jsonl 0"]
    _, held_out = read(folder, eval_data={"path": str(folder), "split": "validation", "rows": 0.2})
    assert len(held_out[""]) == 4
    own = {"near": {"path": str(folder), "split": "validation"}, "far": str(folder / "test.jsonl")}
    _, held_out = read(folder, eval_data=own, eval_rows=5)
    assert {name: len(rows) for name, rows in held_out.items()} == {"near": 5, "far": 5}
    with pytest.raises(UserError, match="eval_data: 'spilt' is not one of path, split, config, rows"):
        read(folder, eval_data={"path": str(folder), "spilt": "test"})


def test_more_held_out_rows_than_there_are_means_all_of_them(folder):
    _, held_out = read(folder, eval_data={"path": str(folder), "split": "test", "rows": 1000})
    assert len(held_out[""]) == 10


def test_several_data_sets_have_shares(folder):
    parts = [{"path": str(folder), "share": 0.7}, {"path": str(folder), "split": "test", "share": 0.3}]
    train, _ = read(folder, data=parts)
    assert [(len(rows), rows.share, rows.examples[0].source) for rows in train] == [(40, 0.7, 0), (10, 0.3, 1)]
    with pytest.raises(UserError, match="give each of several data sets a share above 0"):
        read(folder, data=[{"path": str(folder)}, {"path": str(folder)}])
    with pytest.raises(UserError, match="^data: give each of several data sets a share, as in "):
        read(folder, data=["a.jsonl", "b.jsonl"])
    with pytest.raises(UserError, match="dataset_split has no effect if data is a list"):
        read(folder, data=parts, dataset_split="test")
    with pytest.raises(UserError, match="eval_rows cannot hold rows out of several data sets"):
        read(folder, data=parts, eval_rows=3)


def test_bad_rows_are_skipped_and_kept_on_request(folder):
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"text": 3}\n{"text": \n')
    with pytest.raises(UserError, match=r"line 41: 'text' is a int.*; on_bad_row=skip leaves such rows out"):
        read(folder)
    (train,), _ = read(folder, on_bad_row="skip")
    assert len(train) == 40
    assert [str(error).split(": ")[0].split(", ")[1] for error in train.bad] == [
        "line 41",
        "line 42, column 10",
    ] or len(train.bad) == 2


def test_a_column_that_plays_no_part_does_not_change_what_a_comparison_sees(folder):
    (train,), _ = read(folder)
    before = repr(train.examples)
    text = (folder / "train.jsonl").read_text().replace('{"text"', '{"id": 1, "text"')
    (folder / "train.jsonl").write_text(text)
    (train,), _ = read(folder)
    assert repr(train.examples) == before


def test_encoded_rows_of_the_hub_are_not_kept(folder):
    with pytest.raises(
        UserError, match="dataset_prepared_path keeps encoded rows of local data, but a/b is a hub name"
    ):
        read("a/b", dataset_prepared_path=str(folder / "stores"))
