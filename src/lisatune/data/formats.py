"""Rows of a data set to messages or text. Reads files; knows nothing of tokens, and needs no torch."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from lisatune.errors import UserError, did_you_mean, missing_package

LOCAL_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
LIBRARY_SUFFIXES = {".parquet": "parquet", ".csv": "csv", ".csv.gz": "csv"}
PAIRS = (("prompt", "completion"), ("question", "answer"), ("problem", "solution"))
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
KNOWN_COLUMNS = (
    "messages; prompt and completion; instruction, input and output; conversations; question and answer; text"
)


class Message(TypedDict):
    """One turn: ``role`` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """A raw row and where it stands, for messages to the user: ``file, line 3``."""

    where: str
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """One training example: a chat, whose assistant turns are to be learnt, or plain text, all of it to be learnt."""

    where: str
    messages: tuple[Message, ...] = ()
    text: str | None = None


def parse_row(row: Row) -> Example:
    """Recognise a row by its columns.

    ================================  =================================================================
    columns                           becomes
    ================================  =================================================================
    messages                          the chat; role and content each
    conversations                     the chat (sharegpt); from (human, gpt, system) and value each
    prompt, completion                a question and an answer; strings, or lists of messages
    question, answer                  the same; so do problem, solution
    instruction, input, output        the same; the input, if any, follows after an empty line
    text                              text, all of it learnt
    ================================  =================================================================

    Further columns are left alone.

    Raises: UserError that names the place and the remedy.
    Example:
        >>> parse_row(Row("x.jsonl, line 1", {"prompt": "2+2?", "completion": "4"})).messages
        ({'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'})
    """
    columns = row.columns
    if "messages" in columns:
        return _chat(row, columns["messages"], "role", "content")
    if "conversations" in columns:
        return _chat(row, columns["conversations"], "from", "value")
    for question, answer in PAIRS:
        if question in columns and answer in columns:
            if isinstance(columns[question], list) or isinstance(columns[answer], list):
                turns = [*_as_messages(row, question, "user"), *_as_messages(row, answer, "assistant")]
                return _chat(row, turns, "role", "content")
            return _pair(row, _string(row, question), _string(row, answer))
    if "instruction" in columns and "output" in columns:
        extra = _string(row, "input", default="")
        instruction = _string(row, "instruction")
        return _pair(row, f"{instruction}\n\n{extra}" if extra.strip() else instruction, _string(row, "output"))
    if "text" in columns:
        return Example(row.where, text=_string(row, "text"))
    raise UserError(
        f"{row.where}: columns {', '.join(map(str, columns)) or '(none)'} are not recognised; expected {KNOWN_COLUMNS}"
    )


def _string(row: Row, column: str, default: str | None = None) -> str:
    value = row.columns.get(column, default)
    if value is None and default is not None:
        value = default
    if not isinstance(value, str):
        raise UserError(f"{row.where}: '{column}' is {_kind(value)}, but must be a string")
    return value


def _as_messages(row: Row, column: str, role: str) -> list[Any]:
    value = row.columns[column]
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _pair(row: Row, question: str, answer: str) -> Example:
    return Example(row.where, (Message(role="user", content=question), Message(role="assistant", content=answer)))


def _chat(row: Row, turns: Any, role_key: str, content_key: str) -> Example:
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise UserError(
            f"{row.where}: a chat must be a list of turns with '{role_key}' and '{content_key}', at least one"
        )
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get(content_key), str):
            raise UserError(f"{row.where}: turn {number} has no '{content_key}' that is a string")
        role = turn.get(role_key)
        if role not in ROLES:
            raise UserError(f"{row.where}: turn {number} has {role_key} {role!r}; expected one of {', '.join(ROLES)}")
        messages.append(Message(role=ROLES[role], content=turn[content_key]))
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{row.where}: the chat has no assistant turn, so there is nothing to learn")
    return Example(row.where, tuple(messages))


def _kind(value: Any) -> str:
    return "missing or null" if value is None else f"a {type(value).__name__}"


def read_rows(data: str, *, split: str = "train", streaming: bool = False) -> Iterator[Row]:
    """Rows of a file, a folder of such files, or a data set of the Hugging Face hub.

    JSON and JSON lines, gzip or not, are read here and need no package; Parquet, CSV and hub names go through
    ``datasets``. Nothing is read before the first row is asked for.

    Args:
        data: A path, or a hub name such as ``databricks/databricks-dolly-15k``.
        split: Of a hub data set.
        streaming: Read a hub data set as it downloads, instead of downloading it first.
    Yields: ``Row``, in the order of the file; files of a folder in the order of their names.
    Raises: UserError naming file and line for what is malformed.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        files = [f for f in sorted(path.rglob("*")) if f.is_file() and _suffix(f)]
        if not files:
            raise UserError(f"{data}: the folder holds no {', '.join(LOCAL_SUFFIXES)}, .parquet or .csv file")
        for file in files:
            yield from _read_file(file)
    elif path.is_file():
        yield from _read_file(path)
    elif path.exists() or _looks_like_path(data):
        nearby = [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{data}: no such file or folder{did_you_mean(path.name, nearby)}")
    else:
        yield from _read_with_library(data, split, streaming)


def _looks_like_path(data: str) -> bool:
    return data.startswith((".", "/", "~")) or data.count("/") != 1 or _suffix(Path(data)) is not None


def _suffix(path: Path) -> str | None:
    return next((s for s in (*LOCAL_SUFFIXES, *LIBRARY_SUFFIXES) if path.name.lower().endswith(s)), None)


def _read_file(path: Path) -> Iterator[Row]:
    suffix = _suffix(path)
    if suffix is None:
        raise UserError(f"{path}: expected a file ending in {', '.join((*LOCAL_SUFFIXES, *LIBRARY_SUFFIXES))}")
    if suffix in LIBRARY_SUFFIXES:
        yield from _read_with_library(str(path), "train", streaming=True, builder=LIBRARY_SUFFIXES[suffix])
        return
    try:
        yield from _read_json(path) if ".jsonl" not in suffix else _read_json_lines(path)
    except (OSError, EOFError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); is it a whole{' gzip' * suffix.endswith('.gz')} file?"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error


def _open(path: Path) -> Any:
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8-sig")


def _read_json_lines(path: Path) -> Iterator[Row]:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _row(f"{path}, line {number}", _parse(line.rstrip(), path, number))


def _read_json(path: Path) -> Iterator[Row]:
    """A list of rows; or, as many tools write under this name, one row a line."""
    with _open(path) as file:
        text = file.read()
    if not text.lstrip().startswith("["):
        yield from _read_json_lines(path)
        return
    for number, item in enumerate(_parse(text, path, 1), start=1):
        yield _row(f"{path}, row {number}", item)


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {line + error.lineno - 1}, column {error.colno}: not valid JSON ({error.msg}); mend or remove it"
        ) from error
    except RecursionError as error:
        raise UserError(f"{path}, line {line}: JSON nested too deep to read; mend or remove it") from error


def _row(where: str, columns: Any) -> Row:
    if not isinstance(columns, dict):
        raise UserError(f"{where}: a row must be a JSON object, not {_kind(columns)}")
    return Row(where, columns)


def _read_with_library(data: str, split: str, streaming: bool, builder: str | None = None) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise missing_package("datasets", f"reading {data}", "data") from error
    try:
        if builder:
            rows = datasets.load_dataset(builder, data_files=data, split="train", streaming=True)
        else:
            rows = datasets.load_dataset(data, split=split, streaming=streaming)
        for number, columns in enumerate(rows, start=1):
            yield Row(f"{data}, row {number}", columns)
    except UserError:
        raise
    except Exception as error:  # datasets raises many kinds, none of them ours
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = (
            "is it a whole file?"
            if builder
            else "is the name right, is the hub reachable? Local data is given as a path"
        )
        raise UserError(f"{data}: cannot be read as a data set ({reason}); {hint}") from error
