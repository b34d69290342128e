"""A store gives back the very documents that were encoded, from the disk."""

import json

import numpy as np
import pytest

from chat_templates import FORGETS_THOUGHTS, make_tokenizer
from lisatune.data import fingerprint
from lisatune.data.examples import Rows
from lisatune.data.files import find_source
from lisatune.data.formats import RowParser
from lisatune.data.store import Store, encode_rows, key_of
from lisatune.data.tokenize import Encoder

CHAT = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Uno.", "weight": 0.5},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Dos."},
]


def rows_of_file(path, **options):
    return Rows(str(path), find_source(str(path)), RowParser(), **options)


def encoder(**options):
    return Encoder(make_tokenizer(FORGETS_THOUGHTS), 100, **options)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"messages": CHAT},
        {"prompt": "a", "completion": ""},
        *({"prompt": f"{i}?", "completion": f"{i}"} for i in range(9)),
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("num_proc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_documents_from_the_disk_are_those_in_memory(path, tmp_path, num_proc):
    in_memory = encoder()
    documents = list(in_memory(rows_of_file(path)))
    on_disk = encoder()
    store = encode_rows(rows_of_file(path), on_disk, tmp_path / "stores", num_proc=num_proc)
    assert list(store) == documents
    assert on_disk.counts == in_memory.counts
    assert fingerprint.of_documents(store) == fingerprint.of_documents(documents)
    assert store.lengths().tolist() == [len(document) for document in documents]


def test_a_token_takes_two_bytes_and_nothing_is_encoded_twice(path, tmp_path):
    told = []
    store = encode_rows(rows_of_file(path), encoder(), tmp_path / "stores", num_proc=1, tell=told.append)
    assert (store.folder / "ids").stat().st_size == 2 * store.lengths().sum()
    assert told
    again = encode_rows(rows_of_file(path), encoder(), tmp_path / "stores", num_proc=1, tell=pytest.fail)
    assert list(again) == list(store)


def test_all_that_matters_is_in_the_key(path, tmp_path):
    base = key_of(rows_of_file(path), encoder())
    changed = encoder()
    changed.tokenizer.chat_template += " "
    bigger = encoder()
    bigger.tokenizer.add_tokens(["<new>"])
    other = rows_of_file(path)
    other.parser = RowParser({}, {"bot": "assistant"})
    keys = [
        key_of(rows_of_file(path), changed), key_of(rows_of_file(path), bigger), key_of(other, encoder()),
        key_of(rows_of_file(path), encoder(loss_on="last")), key_of(rows_of_file(path), encoder(too_long="drop")),
    ]  # fmt: skip
    path.write_text(path.read_text().replace("One", "Eno"))
    keys.append(key_of(rows_of_file(path), encoder()))
    assert len({base, *keys}) == 7


def test_rows_can_be_held_out_of_a_store(path, tmp_path):
    store = encode_rows(rows_of_file(path), encoder(), tmp_path / "stores", num_proc=1)
    assert store.about["num_examples"] == 11
    held_out, rest = store.split({0, 10})
    assert [document.where.split(", ", 1)[1] for document in held_out] == [
        "line 1, answer 1",
        "line 1, answer 2",
        "line 11",
    ]
    assert len(rest) == len(store) - 3
    assert isinstance(rest, Store)
    assert rest[0:2] == [rest[0], rest[1]]
    assert np.array_equal(rest.lengths(), [len(document) for document in rest])


def test_bad_rows_that_are_skipped_are_counted_in_the_store(path, tmp_path):
    path.write_text('{"text": \n{"who": 1}\n' + path.read_text())
    skipping = encoder(on_bad_row="skip")
    store = encode_rows(rows_of_file(path, on_bad_row="skip"), skipping, tmp_path / "stores", num_proc=1)
    assert skipping.counts.reasons["a bad row"] == 2
    assert store.counts == skipping.counts


def test_a_folder_that_was_saved_to_disk_is_kept_and_known_by_its_rows(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra 'data' is not installed")
    datasets.disable_progress_bars()
    keys = []
    for word in ("one", "two"):
        rows = datasets.Dataset.from_list([{"text": word}, {"text": "three"}])
        datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "saved")
        store = encode_rows(rows_of_file(tmp_path / "saved"), encoder(), tmp_path / "stores", num_proc=1)
        assert len(store) == 2
        keys.append(store.folder.name)
    assert keys[0] != keys[1]


def test_how_many_rows_each_file_had_is_kept_too(path, tmp_path):
    for _ in range(2):
        rows = rows_of_file(path)
        encode_rows(rows, encoder(), tmp_path / "stores", num_proc=1)
        assert [file.num_rows for file in rows.source.read] == [11]
        assert rows.source.num_rows == 11
