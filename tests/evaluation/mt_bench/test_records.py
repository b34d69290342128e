import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from lisatune.errors import UserError
from lisatune.evaluation.mt_bench.records import Records, key_of


def test_what_was_added_is_there_again(tmp_path):
    Records(tmp_path / "a.jsonl").add("k", {"answer": "é\ud800\n"})
    assert Records(tmp_path / "a.jsonl").get("k") == {"answer": "é\ud800\n"}
    assert Records(tmp_path / "a.jsonl").get("other") is None


def test_a_line_torn_by_a_kill_is_dropped_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "a.jsonl"
    for key in "ab":
        Records(path).add(key, {"answer": key})
    whole = path.read_bytes()
    for length in range(whole.index(b"\n") + 1, len(whole)):  # wherever the kill falls
        path.write_bytes(whole[:length])
        records = Records(path)
        assert (len(records), records.get("b")) == (1, None)
        records.add("b", {"answer": "b"})
        assert path.read_bytes() == whole


@pytest.mark.parametrize("line", ["not JSON", "[]", "{}", '"key"', "[" * 100_000])
def test_a_damaged_line_is_told_of_and_not_dropped(tmp_path, line):
    path = tmp_path / "a.jsonl"
    Records(path).add("a", {})
    path.write_text(path.read_text() + line + "\n" + json.dumps({"key": "b"}) + "\n")
    with pytest.raises(UserError, match="a.jsonl, line 2: not a record of this tool"):
        Records(path)


def test_threads_do_not_mix_their_lines(memory_path):
    records = Records(memory_path / "a.jsonl")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: records.add(str(i), {"text": str(i) * 5000}), range(40)))
    again = Records(memory_path / "a.jsonl")
    assert [again.get(str(i)) for i in range(40)] == [{"text": str(i) * 5000} for i in range(40)]


def test_it_does_not_write_through_a_link(tmp_path):
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a symbolic link"):
        Records(tmp_path / "a.jsonl")


def test_keys_differ_where_anything_does():
    assert len({key_of(a="1"), key_of(a=1), key_of(b="1"), key_of(a="1", b=None)}) == 4
