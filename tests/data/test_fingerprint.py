"""What a data set is recognised by."""

from array import array

import pytest

from lisatune.data.fingerprint import of_documents, of_stream
from lisatune.data.tokenize import Encoded


def document(ids, labels, where=""):
    return Encoded(array("i", ids), array("i", labels), where)


def test_documents_differ_in_ids_labels_order_and_where_one_ends():
    base = [document([1, 2, 3], [-100, 2, 3]), document([4, 5], [4, 5])]
    others = [
        [document([1, 2, 9], [-100, 2, 9]), base[1]],
        [document([1, 2, 3], [1, 2, 3]), base[1]],
        base[::-1],
        [document([1, 2], [-100, 2]), document([3, 4, 5], [3, 4, 5])],
        base[:1],
    ]
    assert len({of_documents(some) for some in [base, *others]}) == 6
    assert of_documents(base) == of_documents([document([1, 2, 3], [-100, 2, 3], "elsewhere"), base[1]])


@pytest.mark.parametrize("change", ["first byte", "last byte", "length", "name", "one more"])
def test_a_stream_is_known_by_its_files(tmp_path, change):
    held = bytes(3 * 2**20)
    (tmp_path / "a.jsonl").write_bytes(held)
    before = of_stream(str(tmp_path))
    assert before == of_stream(str(tmp_path))
    assert before.startswith("1 files of 3,145,728 bytes (")
    if change == "name":
        (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    elif change == "one more":
        (tmp_path / "b.jsonl").write_bytes(b"")
    else:
        changed = {"first byte": b"1" + held[1:], "last byte": held[:-1] + b"1", "length": held[:-1]}[change]
        (tmp_path / "a.jsonl").write_bytes(changed)
    assert of_stream(str(tmp_path)) != before


def test_a_hub_name_stands_for_itself():
    assert of_stream("someone/data") == "someone/data"
