import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lisatune import UserError
from lisatune.data.formats import Row, parse_row, read_rows

CHAT = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": list(CHAT)},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [CHAT[0]], "completion": [CHAT[1]]},
        {"question": "Hi", "answer": "Hello"},
        {"problem": "Hi", "solution": "Hello", "level": 3},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"instruction": "Hi", "input": None, "output": "Hello"},
        {"instruction": "Hi", "output": "Hello"},
        {"instruction": "Hi", "context": "", "response": "Hello", "category": "chat"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"messages": None, "text": None, "prompt": "Hi", "completion": "Hello"},  # as Arrow has rows of several formats
        {"prompt": "Hi", "completion": None, "query": "Hi", "response": "Hello"},
    ],
)
def test_every_row_format_becomes_the_same_chat(columns):
    assert parse_row(Row("here", columns)).messages == CHAT


@pytest.mark.parametrize("streaming", [False, True])
def test_a_configuration_is_of_the_hub_alone(tmp_path, streaming):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="dataset_config=main needs a hub data set.*leave it out"):
        list(read_rows(str(tmp_path / "rows.jsonl"), config="main", streaming=streaming))


def test_instruction_with_input_and_text():
    assert (
        parse_row(Row("here", {"instruction": "Add", "input": "1 2", "output": "3"})).messages[0]["content"]
        == "Add\n\n1 2"
    )
    assert parse_row(Row("here", {"text": "once"})).text == "once"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": 1, "b": 2}, "columns a, b are not recognised; expected messages;"),
        ({}, r"columns \(none\) are not recognised"),
        ({"prompt": 3, "completion": "x"}, "'prompt' is a int, but must be a string"),
        ({"text": None}, "'text' is missing or null"),
        ({"messages": []}, "at least one"),
        ({"messages": "Hi"}, "a chat must be a list of turns"),
        (
            {"messages": "[{'role': 'user', 'content': 'Hi'}]"},
            "looks like a list, but is not JSON; write the list itself",
        ),
        ({"prompt": "Hi", "completion": None}, "'completion' is missing or null"),
        ({"messages": [{"role": "user"}]}, "turn 1 has no 'content'"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "turn 1 has role 'robot'; expected one of"),
        ({"messages": [CHAT[0]]}, "no assistant turn"),
    ],
)
def test_bad_rows_name_the_place_and_the_remedy(columns, message):
    with pytest.raises(UserError, match="^rows.jsonl, line 7: .*" + message):
        parse_row(Row("rows.jsonl, line 7", columns))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(
    ["messages", "prompt", "completion", "instruction", "input", "output", "conversations", "text", "x"]
)


@given(st.dictionaries(names, json_values | st.just([{"role": "assistant", "content": "x"}]), max_size=4))
def test_any_row_is_an_example_or_a_user_error(columns):
    try:
        example = parse_row(Row("here", columns))
    except UserError as error:
        assert str(error).startswith("here: ")  # noqa: PT017
    else:
        assert (example.text is None) == bool(example.messages)


ROWS = [{"text": "eins"}, {"text": "zwei\nzeilen"}, {"text": "drei ü"}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.json.gz", "lines.json"])
def test_json_files_are_read_without_another_package(tmp_path, name, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    as_list = name.startswith("rows.json") and "jsonl" not in name
    text = (
        json.dumps(ROWS, indent=1) if as_list else "\n\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS) + "\n"
    )
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    rows = list(read_rows(str(tmp_path / name)))
    assert [row.columns for row in rows] == ROWS
    assert rows[2].where == f"{tmp_path / name}, {'row 3' if as_list else 'line 5'}"


def test_parquet_and_csv_go_through_datasets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra 'data' is not installed")
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "rows.parquet")
    table.to_csv(tmp_path / "rows.csv")
    for name in ("rows.parquet", "rows.csv"):
        assert [dict(row.columns) for row in read_rows(str(tmp_path / name))] == ROWS


def test_missing_datasets_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "rows.parquet").write_text("")
    with pytest.raises(UserError, match=r"pip install 'lisatune\[data\]'"):
        list(read_rows(str(tmp_path / "rows.parquet")))


def test_folder_is_read_in_order_of_names(tmp_path):
    for name, text in [("b.jsonl", "two"), ("a.jsonl", "one"), ("notes.txt", "x")]:
        (tmp_path / name).write_text(json.dumps({"text": text}) + "\n")
    assert [row.columns["text"] for row in read_rows(str(tmp_path))] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"text": "a"}\n{"text": \n', r"rows\.jsonl, line 2, column 9: not valid JSON"),
        ("rows.json", b'[{"text": "a"},\n {]', r"rows\.json, line 2, column 3: not valid JSON"),
        ("rows.jsonl", b'{"text": "a"}\n[1]\n', r"rows\.jsonl, line 2: a row must be a JSON object, not a list"),
        ("rows.jsonl", b"\xff\xfe", "is not UTF-8"),
        ("rows.jsonl.gz", b"not gzip", "is it a whole gzip file"),
        ("rows.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-12], "is it a whole gzip file"),
        ("rows.txt", b"x", r"expected a file ending in \.jsonl"),
        ("rows.jsonl", b"[" * 100_000, "nested too deep"),
    ],
)
def test_bad_files_name_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_rows(str(tmp_path / name)))


@pytest.mark.parametrize(
    "table",
    [
        {"prompt": {"0": "a", "1": "b"}, "completion": {"0": "c", "1": "d"}},
        {"0": {"prompt": "a", "completion": "c"}, "1": {"prompt": "b", "completion": "d"}},
        {"prompt": ["a", "b"], "completion": ["c", "d"]},
        {"columns": ["prompt", "completion"], "index": [0, 1], "data": [["a", "c"], ["b", "d"]]},
    ],
)
def test_a_table_that_pandas_wrote_by_columns_is_told_apart_from_rows(tmp_path, table):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    with pytest.raises(UserError, match="holds columns, not rows, as pandas writes them: .*orient='records'"):
        list(read_rows(str(path)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://example.com/rows.jsonl", "it is an address: download it"),
        ("{folder}/*.jsonl", "patterns are not followed: give the folder"),
        ("{folder}/a.jsonl,{folder}/b.jsonl", "give several as a list with shares"),
    ],
)
def test_names_that_other_tools_take_are_answered(tmp_path, name, message):
    for one in "ab":
        (tmp_path / f"{one}.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(UserError, match=f"no such file or folder; {message}"):
        list(read_rows(name.format(folder=tmp_path)))


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(UserError, match=r"no such file or folder; did you mean 'train\.jsonl'"):
        list(read_rows(str(tmp_path / "trian.jsonl")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folder holds no"):
        list(read_rows(str(tmp_path / "empty")))
