"""Rows of a data set to messages or text. Reads files; knows nothing of tokens, and needs no torch."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from lisatune.errors import UserError, did_you_mean, missing_package

LOCAL_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
LIBRARY_SUFFIXES = {".parquet": "parquet", ".csv": "csv", ".csv.gz": "csv"}
PAIRS = (("prompt", "completion"), ("question", "answer"), ("problem", "solution"))
INSTRUCTIONS = (("input", "output"), ("context", "response"))  # Alpaca's names, and Dolly's
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
MARK = "\ufeff"  # that some editors begin a file with; Python's utf-8-sig also takes the first half of it for an empty file
MAX_SHOWN, MAX_SHOWN_LETTERS = 12, 60  # column names in a message, and letters of each
KNOWN_COLUMNS = (
    "messages; prompt and completion; instruction, input and output (or context and response); conversations; "
    "question and answer; text"
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
    instruction, context, response    the same
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
    for extra_name, answer in INSTRUCTIONS:
        if "instruction" in columns and answer in columns:
            extra = _string(row, extra_name, default="")
            instruction = _string(row, "instruction")
            return _pair(row, f"{instruction}\n\n{extra}" if extra.strip() else instruction, _string(row, answer))
    if "text" in columns:
        return Example(row.where, text=_string(row, "text"))
    names = [_shown(name) for name in list(columns)[:MAX_SHOWN]] + ["..."] * (len(columns) > MAX_SHOWN)
    raise UserError(f"{row.where}: columns {', '.join(names) or '(none)'} are not recognised; expected {KNOWN_COLUMNS}")


def _string(row: Row, column: str, default: str | None = None) -> str:
    value = row.columns.get(column, default)
    if value is None and default is not None:
        value = default
    if not isinstance(value, str):
        raise UserError(f"{row.where}: '{column}' is {_kind(value)}, but must be a string")
    return _whole(row, column, value)


def _whole(row: Row, name: str, text: str) -> str:
    """``text``, unless a tokenizer could not take it: JSON may write half of a surrogate pair, UTF-8 may not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{row.where}: '{name}' holds {ascii(text[error.start])[1:-1]}, half of a character, which is no text; "
            "mend or remove it"
        ) from error
    return text


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
        if not isinstance(role, str) or role not in ROLES:
            told = f"'{_shown(role)}'" if isinstance(role, str) else _kind(role)
            raise UserError(f"{row.where}: turn {number} has {role_key} {told}; expected one of {', '.join(ROLES)}")
        messages.append(Message(role=ROLES[role], content=_whole(row, content_key, turn[content_key])))
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{row.where}: the chat has no assistant turn, so there is nothing to learn")
    if messages[0]["role"] == "assistant":
        raise UserError(
            f"{row.where}: the chat begins with an assistant turn, which answers nothing; put a user or system turn first"
        )
    return Example(row.where, tuple(messages))


def _kind(value: Any) -> str:
    return "missing or null" if value is None else f"a {type(value).__name__}"


def _shown(name: Any) -> str:
    """A name of the data in a message to the user: one line that any terminal can print, and not a long one."""
    text = str(name)[:MAX_SHOWN_LETTERS]
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(str(name)) <= MAX_SHOWN_LETTERS else f"{text}..."


def read_rows(data: str, *, split: str = "train", config: str | None = None, streaming: bool = False) -> Iterator[Row]:
    """Rows of a file, a folder of such files, or a data set of the Hugging Face hub.

    JSON and JSON lines, gzip or not, are read here and need no package; Parquet, CSV and hub names go through
    ``datasets``. Nothing is read before the first row is asked for.

    Args:
        data: A path, or a hub name such as ``databricks/databricks-dolly-15k``.
        split: Of a hub data set.
        config: Of a hub data set that has several, as ``main`` of ``openai/gsm8k``.
        streaming: Read a hub data set as it downloads, instead of downloading it first.
    Yields: ``Row``, in the order of the file; files of a folder in the order of their names.
    Raises: UserError naming file and line for what is malformed.
    """
    files = find_files(data, config=config)
    if files is None:
        yield from _read_with_library(data, split, streaming, config=config)
    else:
        for file in files:
            yield from _read_file(file)


def find_files(data: str, *, config: str | None = None) -> list[Path] | None:
    """The files that ``data`` names, or None for a name of the hub; only there is a ``config``."""
    files = _find_files(data)
    if files is not None and config is not None:
        raise UserError(
            f"dataset_config={_shown(config)} is of a hub data set, but {data} is on this machine: leave it out"
        )
    return files


def _find_files(data: str) -> list[Path] | None:
    if not data.strip():
        raise UserError("the data's name is empty: give a file, a folder or a hub name")  # Path("") is where we stand
    try:
        path = Path(data).expanduser()
        if path.is_dir():
            return _files_of_folder(path)
        if path.is_file():
            return [path]
        if path.exists() or _looks_like_path(data):
            nearby = [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else []
            raise UserError(f"{data}: no such file or folder{did_you_mean(path.name, nearby)}")
    except (OSError, RuntimeError) as error:  # a name too long, a folder that may not be read, ~ of an unknown user
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{_shown(data)}: cannot be looked up ({reason}); give the path of a file or folder") from error
    return None


def _files_of_folder(folder: Path) -> list[Path]:
    """Every file of rows below ``folder``; one that cannot be read is an error, where ``rglob`` passes it by."""

    def refuse(error: OSError) -> None:
        raise error

    files = []
    for place, subfolders, names in os.walk(folder, onerror=refuse):
        for name in subfolders:
            if (link := Path(place, name)).is_symlink():
                raise UserError(f"{link}: a link to another folder is not followed; remove it, or give that folder")
        files += [file for name in names if _suffix(file := Path(place, name))]
    if not files:
        raise UserError(f"{folder}: the folder holds no {', '.join(LOCAL_SUFFIXES)}, .parquet or .csv file")
    return sorted(files)


def _looks_like_path(data: str) -> bool:
    return data.startswith((".", "/", "~")) or data.count("/") != 1 or _suffix(Path(data)) is not None


def _suffix(path: Path) -> str | None:
    return next((s for s in (*LOCAL_SUFFIXES, *LIBRARY_SUFFIXES) if path.name.lower().endswith(s)), None)


def _read_file(path: Path) -> Iterator[Row]:
    suffix = _suffix(path)
    if suffix is None:
        raise UserError(f"{path}: expected a file ending in {', '.join((*LOCAL_SUFFIXES, *LIBRARY_SUFFIXES))}")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is not a regular file; give one that holds rows")  # a pipe would be waited for
    if suffix in LIBRARY_SUFFIXES:
        yield from _read_with_library(str(path), "train", streaming=True, builder=LIBRARY_SUFFIXES[suffix])
        return
    try:
        try:
            yield from _read_json(path) if ".jsonl" not in suffix else _read_json_lines(path)
        except UnicodeDecodeError as error:
            reason = f"{error.reason}{_bad_line(path)}"
            raise UserError(f"{path}: is not UTF-8 text ({reason}); save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); is it a whole{' gzip' * suffix.endswith('.gz')} file?"
        ) from error


def _open(path: Path, mode: str = "rt") -> Any:
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    return opener(path, mode, encoding="utf-8" if mode == "rt" else None)


def _bad_line(path: Path) -> str:
    """Where text stops being UTF-8; found by a second look, as text is decoded ahead of the line that is read."""
    with _open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f" in line {number}"
    return ""


def _read_json_lines(path: Path) -> Iterator[Row]:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(MARK)
            if line.strip():
                yield _row(f"{path}, line {number}", _parse(line.rstrip(), path, number))


def _read_json(path: Path) -> Iterator[Row]:
    """A list of rows; or, as many tools write under this name, one row a line."""
    with _open(path) as file:
        text = file.read().removeprefix(MARK)
    if not text.lstrip().startswith("["):
        yield from _read_json_lines(path)
        return
    for number, item in enumerate(_parse(text, path), start=1):
        yield _row(f"{path}, row {number}", item)


def _parse(text: str, path: Path, line: int | None = None) -> Any:
    where = str(path) if line is None else f"{path}, line {line}"
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {(line or 1) + error.lineno - 1}, column {error.colno}: not valid JSON ({error.msg}); mend or remove it"
        ) from error
    except RecursionError as error:
        raise UserError(f"{where}: JSON nested too deep to read; mend or remove it") from error
    except _Twice as error:
        raise UserError(f"{where}: '{_shown(error)}' stands twice in one object; remove one of them") from error
    except ValueError as error:  # of int(), which reads no more than 4,300 digits
        raise UserError(f"{where}: holds a number of too many digits to read; mend or remove it") from error


class _Twice(Exception):
    """A name that an object holds twice; json would keep the last and lose the others in silence."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    columns = dict(pairs)
    if len(columns) < len(pairs):
        raise _Twice(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return columns


def _row(where: str, columns: Any) -> Row:
    if not isinstance(columns, dict):
        raise UserError(f"{where}: a row must be a JSON object, not {_kind(columns)}")
    return Row(where, columns)


def _read_with_library(
    data: str, split: str, streaming: bool, *, builder: str | None = None, config: str | None = None
) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise missing_package("datasets", f"reading {data}", "data") from error
    try:
        if builder:
            rows = datasets.load_dataset(builder, data_files=data, split="train", streaming=True)
        else:
            rows = datasets.load_dataset(data, config, split=split, streaming=streaming)
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
