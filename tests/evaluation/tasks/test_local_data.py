"""Files of data sets in the form that the harness has from the hub."""

import pytest

from lisatune import UserError
from lisatune.evaluation.tasks.local_data import read_data_set
from small_tasks import write_tasks


@pytest.fixture
def folder(tmp_path):
    return write_tasks(tmp_path)


def test_pubmedqa_test_is_what_the_ground_truth_names(folder):
    splits = read_data_set(folder, "bigbio/pubmed_qa", "pubmed_qa_labeled_fold0_source")
    assert [row["QUESTION"] for row in splits["test"]] == ["Does 1 help?", "Does 4 help?"]
    assert len(splits["train"]) == 4


def test_mmlu_is_told_apart_by_subject(folder):
    rows = read_data_set(folder, "cais/mmlu", "virology")["test"]
    assert [row["answer"] for row in rows] == [0, 1, 2]
    assert {row["subject"] for row in rows} == {"virology"}


def test_agieval_asks_as_its_authors_do(folder):
    with_passage = read_data_set(folder, "hails/agieval-sat-en", None)["test"][0]
    without = read_data_set(folder, "hails/agieval-sat-en-without-passage", None)["test"][0]
    asked = "Q: Who sat? Answer Choices: (A)cat (B)dog (C)hen\nA: Among A through C, the answer is"
    assert with_passage["query"] == f"A cat sat. {asked}"
    assert without["query"] == read_data_set(folder, "hails/agieval-aqua-rat", None)["test"][0]["query"] == asked
    assert without["gold"] == [0]


def test_halves_of_a_split_are_joined(folder):
    half = folder / "gsm8k/test.even.jsonl.gz"
    (folder / "gsm8k/test.odd.jsonl.gz").write_bytes(half.read_bytes())
    assert len(read_data_set(folder, "openai/gsm8k", "main")["test"]) == 6


def test_what_has_no_local_form_is_left_to_the_hub(folder):
    assert read_data_set(folder, "Rowan/hellaswag", None) is None


def test_a_missing_file_is_named(folder):
    (folder / "winogrande/dev.jsonl").unlink()
    with pytest.raises(UserError, match=r"winogrande/dev\*.json\*: no such file; put the data set's file there"):
        read_data_set(folder, "allenai/winogrande", "winogrande_xl")
    (folder / "pubmedqa/test_ground_truth.json").unlink()
    with pytest.raises(UserError, match="holds no test_ground_truth.json"):
        read_data_set(folder, "bigbio/pubmed_qa", None)


@pytest.mark.parametrize(
    ("data_set", "file", "text", "message"),
    [
        ("openai/gsm8k", "gsm8k/train.jsonl", '{"question": "?"}\n', "train.jsonl, line 1: not a row of openai/gsm8k"),
        ("openai/gsm8k", "gsm8k/train.jsonl", "{\n", "train.jsonl, line 1"),
        ("allenai/winogrande", "winogrande/dev.jsonl", "", "holds no rows"),
        (
            "hails/agieval-sat-en",
            "agieval/sat-en.jsonl",
            '{"passage": 1, "options": []}\n',
            "sat-en.jsonl, line 1: not a row",
        ),
        ("bigbio/pubmed_qa", "pubmedqa/ori_pqal.json", "[1]", "not an object by PMID"),
        ("bigbio/pubmed_qa", "pubmedqa/ori_pqal.json", "{", "cannot be read as JSON"),
    ],
)
def test_a_bad_file_is_one_sentence(folder, data_set, file, text, message):
    for old in (folder / file).parent.glob("train*"):
        old.unlink()
    if "winogrande" in file:
        (folder / "winogrande/train_m.jsonl").write_text(
            '{"sentence": "_", "option1": "", "option2": "", "answer": "1"}'
        )
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=message):
        read_data_set(folder, data_set, None)


def test_the_real_files_are_the_halves_that_they_say(shared):
    def count(data_set, split):
        return len(read_data_set(shared / "data", data_set, "anatomy")[split])

    assert count("openai/gsm8k", "test") == 660
    assert count("bigbio/pubmed_qa", "test") == 250
    assert count("allenai/winogrande", "validation") == 646
    assert count("cais/mmlu", "dev") == 5
    assert count("hails/agieval-sat-math", "test") == 110
