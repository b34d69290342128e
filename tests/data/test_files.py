"""Every file of a folder is read, or named with the reason why not."""

import json
import re

import pytest

from lisatune import UserError
from lisatune.data.files import HELD_OUT_SPLITS, find_source
from lisatune.data.read import count_rows, read_rows


def write(folder, files):
    """Files of one row each, whose text is the file's name."""
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n" if "json" in name else "x")
    return str(folder)


def texts(data, **options):
    return [row.columns["text"] for row in read_rows(data, **options)]


def left_out(data, **options):
    source = find_source(data, **options)
    return {str(file.path.relative_to(data)): file.left_out for file in source.files if file.left_out}


REPOSITORY = ["train.jsonl", "test.jsonl", "validation.jsonl", "README.md", ".gitattributes", "notes.txt"]


def test_a_folder_with_splits_gives_the_training_rows_and_names_the_rest(tmp_path):
    data = write(tmp_path, REPOSITORY)
    assert texts(data) == ["train.jsonl"]
    assert left_out(data) == {
        "test.jsonl": "split test",
        "validation.jsonl": "split validation",
        "README.md": "not a file of rows",
        ".gitattributes": "hidden",
        "notes.txt": "not a file of rows",
    }
    assert (
        find_source(data)
        .describe()
        .startswith(f"{data}: 1 file, split train (train.jsonl); left out: .gitattributes (hidden), ")
    )


def test_the_split_can_be_chosen_and_held_out_data_takes_the_one_to_test_on(tmp_path):
    data = write(tmp_path, REPOSITORY)
    assert texts(data, split="validation") == ["validation.jsonl"]
    assert texts(data, split=HELD_OUT_SPLITS) == ["test.jsonl"]
    (tmp_path / "test.jsonl").unlink()
    assert texts(data, split=HELD_OUT_SPLITS) == ["validation.jsonl"]
    with pytest.raises(UserError, match="has no split test, but train, validation: set dataset_split=train"):
        texts(data, split="test")


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["a.jsonl", "b.json"], ["a.jsonl", "b.json"]),
        (["a.jsonl", "x-test.jsonl"], ["a.jsonl"]),
        (["train/a.jsonl", "train/b.jsonl", "dev/a.jsonl"], ["train/a.jsonl", "train/b.jsonl"]),
        (["data/train-00000-of-00002.jsonl", "data/test-00000-of-00001.jsonl"], ["data/train-00000-of-00002.jsonl"]),
        (
            ["part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl"],
            ["part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl"],
        ),
        (["my_train_set.jsonl", "my_eval_set.jsonl"], ["my_train_set.jsonl"]),
        (["training.jsonl", "testing.jsonl", "contest.jsonl"], ["contest.jsonl", "training.jsonl"]),
        (["en/train.jsonl", "en/test.jsonl"], ["en/train.jsonl"]),
    ],
)
def test_splits_are_told_by_names_as_on_the_hub(tmp_path, names, read):
    assert texts(write(tmp_path, names)) == read


def test_a_split_with_a_name_of_its_own_is_asked_for(tmp_path):
    data = write(tmp_path, ["data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl"])
    with pytest.raises(UserError, match="has no split train, but test_sft, train_sft"):
        texts(data)
    assert texts(data, split="train_sft") == ["data/train_sft-00000-of-00001.jsonl"]


def test_several_configurations_have_to_be_chosen_from(tmp_path):
    data = write(tmp_path, ["main/train.jsonl", "main/test.jsonl", "other/train.jsonl"])
    with pytest.raises(UserError, match=r"several configurations \(main, other\): set dataset_config="):
        texts(data)
    assert texts(data, config="main") == ["main/train.jsonl"]
    assert left_out(data, config="main") == {
        "main/test.jsonl": "split test",
        "other/train.jsonl": "configuration other",
    }
    with pytest.raises(UserError, match="has no configuration mian, but main, other"):
        texts(data, config="mian")


@pytest.mark.parametrize("head", ["- config_name: main", "- config_name: main\n  default: true\n- config_name: other"])
def test_the_card_of_a_repository_says_which_configuration_is_meant(tmp_path, head):
    data = write(tmp_path, ["main/train.jsonl", "other/train.jsonl"])
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{head}\n---\n# card\n")
    assert texts(data) == ["main/train.jsonl"]
    assert texts(data, config="other") == ["other/train.jsonl"]


def test_the_card_of_a_repository_says_which_files_are_of_a_split(tmp_path):
    data = write(tmp_path, ["a.jsonl", "b.jsonl", "c.jsonl"])
    card = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a*\n  - split: test\n    path: [b.jsonl]\n"
    (tmp_path / "README.md").write_text(f"---\n{card}---\n")
    assert texts(data) == ["a.jsonl"]
    assert texts(data, split="test") == ["b.jsonl"]
    assert left_out(data)["c.jsonl"] == "not named in README.md"


@pytest.mark.parametrize("name", ["rows.jsonl", "folder"])
def test_a_split_of_data_that_has_none_is_refused(tmp_path, name):
    write(tmp_path, ["rows.jsonl", "folder/a.jsonl"])
    with pytest.raises(UserError, match="dataset_split=test needs a hub data set or a folder with splits"):
        texts(str(tmp_path / name), split="test")
    with pytest.raises(UserError, match="dataset_config=main needs a hub data set or a folder with several"):
        texts(str(tmp_path / name), config="main")


def test_what_describes_a_data_set_is_no_row(tmp_path):
    data = write(tmp_path, ["dataset_infos.json", "rows.jsonl"])
    assert texts(data) == ["rows.jsonl"]
    assert left_out(data) == {"dataset_infos.json": "about the data set"}


def test_a_folder_that_was_saved_to_disk_is_read(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra 'data' is not installed")
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "two")
    assert texts(str(tmp_path / "one")) == texts(str(tmp_path / "two")) == ["one", "two"]
    assert texts(str(tmp_path / "two"), split="test") == ["two"]
    with pytest.raises(UserError, match="has no split dev, but test, train"):
        texts(str(tmp_path / "two"), split="dev")


def test_rows_of_files_read_and_left_out_are_counted(tmp_path):
    data = write(tmp_path, REPOSITORY)
    source = find_source(data)
    assert {file.path.name: count_rows(file) for file in source.files} == {
        "train.jsonl": 1, "test.jsonl": 1, "validation.jsonl": 1, "README.md": None, ".gitattributes": None, "notes.txt": None,
    }  # fmt: skip


# -- inside files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["instruction,output\nSay it.,{}\n", "\ufeffinstruction,output\r\nSay it.,{}\r\n"])
@pytest.mark.parametrize(
    "cell", ["NA", "None", "null", "nan", "02108", "1e5", "True", "#N/A", '"a\nb"', '"say ""no"""']
)
def test_a_cell_is_the_text_that_it_is(tmp_path, text, cell):
    (tmp_path / "rows.csv").write_bytes(text.format(cell).encode())
    (row,) = read_rows(str(tmp_path / "rows.csv"))
    expected = cell.strip('"').replace('""', '"') if cell.startswith('"') else cell
    assert dict(row.columns) == {"instruction": "Say it.", "output": expected if cell != '"say ""no"""' else 'say "no"'}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1\n", "row 1: has 1 cells, but the first line has 2"),
        ("a,a\n1,2\n", "the column 'a' appears twice"),
        ('a,b\n1,"2\n', "line 2: not valid CSV"),
        ("prompt;completion\na;b\n", "cells must be separated by commas, not by ';'"),
        ("prompt\tcompletion\na\tb\n", r"cells must be separated by commas, not by '\\t'"),
    ],
)
def test_a_malformed_table_names_the_place(tmp_path, text, message):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        list(read_rows(str(tmp_path / "rows.csv")))


INSTANCES = [{"input": "One?", "output": "Uno."}, {"input": "Two?", "output": "Dos."}]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("key", ["instances", "data", "rows", "train"])
def test_rows_in_an_object_are_read_and_what_is_beside_them_is_named(tmp_path, indent, key):
    (tmp_path / "rows.json").write_text(json.dumps({"type": "text2text", "version": 1, key: INSTANCES}, indent=indent))
    source = find_source(str(tmp_path / "rows.json"))
    assert [dict(row.columns) for row in read_rows(source.data)] == INSTANCES
    list(read_rows(source.data))
    from lisatune.data.read import rows_of

    list(rows_of(source))
    assert source.describe().endswith(f"; rows.json: rows under {key}; left out: version")


def test_a_file_whose_list_is_empty_holds_no_rows(tmp_path):
    (tmp_path / "a.json").write_text('{"type": "text_only", "instances": []}')
    assert list(read_rows(str(tmp_path / "a.json"))) == []


def test_one_object_is_one_row_and_other_objects_are_not_taken_for_rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(INSTANCES[0] | {"data": [{"a": 1}]}, indent=1))
    assert len(list(read_rows(str(path)))) == 1
    path.write_text(json.dumps({"left": [{"a": 1}], "right": [{"a": 1}]}, indent=1))
    with pytest.raises(UserError, match="is one object with lists of rows under left, right"):
        list(read_rows(str(path)))


def test_bad_rows_can_be_passed_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n[1]\n{"text": "b"}\n')
    errors = []
    assert [row.columns["text"] for row in read_rows(str(path), on_bad=errors.append)] == ["a", "b"]
    assert [re.search(r"line \d", str(error))[0] for error in errors] == ["line 2", "line 3"]


def test_parquet_objects_have_no_keys_that_only_other_rows_have(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra 'data' is not installed")
    rows = [
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "tool", "content": "b", "name": "f"}]},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert [dict(row.columns) for row in read_rows(str(tmp_path / "rows.parquet"))] == rows
