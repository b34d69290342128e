"""Rows of files and of hub data sets, as they are. Knows nothing of chats or tokens, and needs no torch."""

from __future__ import annotations

import csv
import gzip
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lisatune.data.files import (
    CSV_SUFFIXES,
    JSON_SUFFIXES,
    MAX_SHOWN,
    SUFFIXES,
    DataFile,
    Source,
    find_source,
    shown,
    suffix_of,
)
from lisatune.errors import UserError, missing_package

MARK = "\ufeff"  # that some editors begin a file with; Python's utf-8-sig also takes the first half of it for an empty file
# an object that holds rows under one of these is a file of rows; LMFlow's own format has "instances"
ROW_KEYS = ("instances", "data", "rows", "examples", "samples", "items", "records")
# a row has one of these, so an object that has one is a row and not a file of rows
ROW_MARKS = frozenset(("messages", "conversations", "prompt", "instruction", "question", "problem", "text", "input"))
OnBadRow = Callable[[UserError], None]


@dataclass(frozen=True)
class Row:
    """A raw row and its place, for messages to the user: ``file, line 3``."""

    where: str
    columns: Mapping[str, Any]


def stop(error: UserError) -> None:
    """What is done with a bad row by default: the run ends."""
    raise error


def stop_and_tell(error: UserError) -> None:
    """``stop`` in a run, where a setting leaves such rows out."""
    raise UserError(f"{error}; on_bad_row=skip leaves such rows out") from error


def read_rows(
    data: str,
    *,
    split: str | Sequence[str] = "train",
    config: str | None = None,
    streaming: bool = False,
    on_bad: OnBadRow = stop,
) -> Iterator[Row]:
    """Rows of a file, a folder of such files, or a data set of the Hugging Face hub.

    JSON, JSON lines and CSV, gzip or not, are read here and need no package. Parquet, folders made by ``save_to_disk``
    and hub names go through ``datasets``. Nothing is read before the first row is asked for.

    Args:
        data: A path, or a hub name such as ``databricks/databricks-dolly-15k``.
        split: The split of a hub data set or a folder; of several, the first that is there.
        config: The configuration, where there are several, as ``main`` of ``openai/gsm8k``.
        streaming: Read a hub data set as it downloads, instead of downloading it first.
        on_bad: Called with the error of a bad row; reading goes on if it returns.
    Yields: ``Row``, in the order of the file; files of a folder in the order of their names.
    Raises: UserError naming file and line for what is malformed.
    """
    yield from rows_of(find_source(data, split=split, config=config), streaming=streaming, on_bad=on_bad)


def rows_of(source: Source, *, streaming: bool = False, on_bad: OnBadRow = stop) -> Iterator[Row]:
    """Rows of ``source``, which counts them."""
    source.num_rows = 0
    if source.kind == "files":
        for file in source.read:
            file.num_rows = 0
            for row in read_file(file, on_bad, split=source.split):
                file.num_rows += 1
                source.num_rows += 1
                yield row
        return
    for row in _saved(source) if source.kind == "saved" else _hub(source, streaming=streaming):
        source.num_rows += 1
        yield row


def count_rows(file: DataFile) -> int | None:
    """Rows of a file, read or left out; None if it holds none that could be read."""
    if suffix_of(file.path) is None or file.path.name.startswith("."):
        return None
    try:
        return sum(1 for _ in read_file(replace(file), lambda error: None))
    except UserError:
        return None


def read_file(file: DataFile, on_bad: OnBadRow = stop, *, split: str = "train") -> Iterator[Row]:
    """Rows of one file; ``split`` chooses among those of a JSON object that holds several."""
    path = file.path
    suffix = suffix_of(path)
    if suffix is None:
        raise UserError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file; give a file that holds rows")  # a pipe would be waited for
    if suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        try:
            if suffix in CSV_SUFFIXES:
                yield from _csv(path, on_bad)
            elif suffix in JSON_SUFFIXES and ".jsonl" not in suffix:
                yield from _json(file, on_bad, split)
            else:
                yield from _json_lines(path, on_bad)
        except UnicodeDecodeError as error:
            reason = f"{error.reason}{_bad_line(path)}"
            raise UserError(f"{path}: is not UTF-8 text ({reason}); save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); is it a whole{' gzip' * suffix.endswith('.gz')} file?"
        ) from error


def _open(path: Path, mode: str = "rt", newline: str | None = None) -> Any:
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    return opener(path, mode, encoding="utf-8" if mode == "rt" else None, newline=newline if mode == "rt" else None)


def _bad_line(path: Path) -> str:
    """Where text stops being UTF-8; found by a second look, as text is decoded ahead of the line that is read."""
    with _open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f" in line {number}"
    return ""


# -- JSON ------------------------------------------------------------------------------------------------------------


def _json_lines(path: Path, on_bad: OnBadRow) -> Iterator[Row]:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(MARK)
            if line.strip():
                try:
                    row = _row(f"{path}, line {number}", _parse(line.rstrip(), path, number))
                except UserError as error:
                    on_bad(error)
                    continue
                yield row


def _json(file: DataFile, on_bad: OnBadRow, split: str) -> Iterator[Row]:
    """A list of rows; an object that holds such a list; or, as many tools write under this name, one row a line."""
    path = file.path
    with _open(path) as opened:
        text = opened.read().removeprefix(MARK)
    if not text.lstrip().startswith("["):
        held = _rows_in_object(file, text, split)
        if held is None:
            yield from _json_lines(path, on_bad)
            return
    else:
        held = _parse(text, path)
    for number, item in enumerate(held, start=1):
        try:
            row = _row(f"{path}, row {number}", item)
        except UserError as error:
            on_bad(error)
            continue
        yield row


def _rows_in_object(file: DataFile, text: str, split: str) -> list[Any] | None:
    """The rows that a file of one JSON object holds; None if it is not such a file."""
    lines = text.strip().splitlines()
    first = lines[0] if lines else ""
    if not first.lstrip().startswith("{") or (len(lines) > 1 and _is_json(first)):
        return None  # no object, or one row a line
    found = _parse(text, file.path)
    if not isinstance(found, dict):
        return None
    lists = (
        {}
        if found.keys() & ROW_MARKS
        else {name: value for name, value in found.items() if _is_rows(value) or (value == [] and name in ROW_KEYS)}
    )
    if _is_table(found):
        raise UserError(
            f"{file.path}: holds columns, not rows, as pandas writes them: write rows, with "
            "to_json(path, orient='records', lines=True)"
        )
    name = next((name for name in (*ROW_KEYS, split) if name in lists), None)
    if name is not None:
        others = [shown(other) for other in found if other not in (name, "type")]
        file.note = f"rows under {shown(name)}" + (f"; left out: {', '.join(others[:MAX_SHOWN])}" if others else "")
        return list(lists[name])
    if lists:
        raise UserError(
            f"{file.path}: is one object with lists of rows under {', '.join(map(shown, lists))}: put the rows to read under "
            "'data', or write one row per line"
        )
    return [found]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _is_table(found: dict[str, Any]) -> bool:
    """Whether an object holds a table as pandas writes one: columns by name, rows by number, or ``columns`` and ``data``."""
    if isinstance(found.get("columns"), list) and isinstance(found.get("data"), list):
        return True
    values = list(found.values())
    if values and all(isinstance(value, dict) for value in values):
        return all(map(str.isdigit, found)) or all(name.isdigit() for value in values for name in value)
    return bool(values) and all(
        isinstance(value, list) and value and all(isinstance(item, str) for item in value) for value in values
    )


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _parse(text: str, path: Path, line: int | None = None) -> Any:
    where = str(path) if line is None else f"{path}, line {line}"
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {(line or 1) + error.lineno - 1}, column {error.colno}: not valid JSON ({error.msg}); fix or remove it"
        ) from error
    except RecursionError as error:
        raise UserError(f"{where}: JSON nested too deep to read; fix or remove it") from error
    except _Twice as error:
        raise UserError(f"{where}: '{shown(error)}' appears twice in one object; remove one of them") from error
    except ValueError as error:  # int() reads 4,300 digits at most
        raise UserError(f"{where}: a number has too many digits to read; fix or remove it") from error


class _Twice(Exception):
    """A name that an object holds twice; json would keep the last and lose the others in silence."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    columns = dict(pairs)
    if len(columns) < len(pairs):
        raise _Twice(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return columns


def _row(where: str, columns: Any) -> Row:
    if not isinstance(columns, dict):
        kind = "missing or null" if columns is None else f"a {type(columns).__name__}"
        hint = '; write a chat as {"messages": [...]}' * (isinstance(columns, list) and _is_rows(columns))
        raise UserError(f"{where}: a row must be a JSON object, not {kind}{hint}")
    return Row(where, columns)


# -- CSV -------------------------------------------------------------------------------------------------------------


def _csv(path: Path, on_bad: OnBadRow) -> Iterator[Row]:
    """Each cell as the text that it is: ``NA``, ``None`` and 02108 too."""
    csv.field_size_limit(sys.maxsize)
    with _open(path, newline="") as opened:
        lines = (line.removeprefix(MARK) if number == 0 else line for number, line in enumerate(opened))
        cells = csv.reader(lines, strict=True)
        try:
            names = next(cells, [])
            twice = next((name for name, count in Counter(names).items() if count > 1), None)
            if twice is not None:
                raise UserError(f"{path}: the column '{shown(twice)}' appears twice in the first line; rename one")
            if len(names) == 1 and (mark := next((mark for mark in ";\t|" if mark in names[0]), None)):
                raise UserError(
                    f"{path}: cells must be separated by commas, not by {mark!r}; save it so, or as JSON lines"
                )
            for number, row in enumerate((row for row in cells if row), start=1):
                where = f"{path}, row {number}"
                if len(row) != len(names):
                    on_bad(
                        UserError(
                            f"{where}: has {len(row)} cells, but the first line has {len(names)}; fix or remove it"
                        )
                    )
                    continue
                yield Row(where, dict(zip(names, row, strict=True)))
        except csv.Error as error:
            raise UserError(f"{path}, line {cells.line_num}: not valid CSV ({error}); fix it") from error


# -- by way of datasets ----------------------------------------------------------------------------------------------


def _parquet(path: Path) -> Iterator[Row]:
    yield from _with_datasets(
        str(path),
        lambda datasets: datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True),
        "is it a whole file?",
    )


def _saved(source: Source) -> Iterator[Row]:
    folder = Path(source.data).expanduser()

    def load(datasets: Any) -> Any:
        loaded = datasets.load_from_disk(str(folder))
        return loaded[source.split] if isinstance(loaded, datasets.DatasetDict) else loaded

    yield from _with_datasets(source.data, load, "is it a whole folder made by save_to_disk?")


def _hub(source: Source, *, streaming: bool) -> Iterator[Row]:
    yield from _with_datasets(
        source.data,
        lambda datasets: datasets.load_dataset(source.data, source.config, split=source.split, streaming=streaming),
        "is the name right, is the hub reachable? Local data is given as a path",
    )


def _with_datasets(data: str, load: Callable[[Any], Any], hint: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise missing_package("datasets", f"reading {data}", "data") from error
    try:
        for number, columns in enumerate(load(datasets), start=1):
            yield Row(f"{data}, row {number}", {name: _without_nulls(value) for name, value in columns.items()})
    except UserError:
        raise
    except Exception as error:  # datasets raises many kinds, none of them ours
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{data}: cannot be read as a data set ({reason}); {hint}") from error


def _without_nulls(value: Any) -> Any:
    """``value`` without the keys that are null: Arrow gives every object of a column all keys that any of them has."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
