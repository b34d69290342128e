"""The rows of a run: those to learn from, and those held out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lisatune.data.files import HELD_OUT_SPLITS, Source, find_source, shown
from lisatune.data.formats import Example, RowParser, parse_rows
from lisatune.data.preferences import JudgedParser
from lisatune.data.read import OnBadRow, rows_of, stop_and_tell
from lisatune.errors import UserError
from lisatune.tasks import TASKS

if TYPE_CHECKING:
    from lisatune.settings import TrainConfig

LARGE_BYTES = 2**26  # files of more together are not held as rows: they are encoded as they are read
PART_KEYS = ("path", "share", "split", "config")
EVAL_KEYS = ("path", "split", "config", "rows")


@dataclass
class Rows:
    """One data set of a run; iterating it gives its examples.

    Args:
        name: The data's name, as it was given.
        source: What it stands for.
        parser: How its rows are read.
        on_bad_row: ``skip`` keeps the errors of bad rows in ``bad``, and goes on.
        share: Its share of the rows that are drawn, where there are several data sets.
        streaming: Read a hub data set as it downloads.
        examples: The examples, if they are held; otherwise they are read anew each time.
        hold_out: Rows (or their share) to be held out of it, where they are not held yet.
        bad: Errors of bad rows, of the last time that rows were read.
    """

    name: str
    source: Source
    parser: RowParser
    on_bad_row: Literal["stop", "skip"] = "stop"
    share: float = 1.0
    streaming: bool = False
    examples: list[Example] | None = None
    hold_out: float = 0
    bad: list[UserError] = field(default_factory=list)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples) if self.examples is not None else self.read()

    def read(self) -> Iterator[Example]:
        """The examples, from the disk or the hub."""
        self.bad.clear()
        rows = rows_of(self.source, streaming=self.streaming, on_bad=self.on_bad)
        return parse_rows(rows, self.parser, self.on_bad)

    @property
    def on_bad(self) -> OnBadRow:
        """What is done with the error of a bad row."""
        return self.bad.append if self.on_bad_row == "skip" else stop_and_tell

    def is_large(self) -> bool:
        """Whether its rows should not be held in memory."""
        return sum(path.stat().st_size for path in self.source.paths) > LARGE_BYTES

    def hold(self) -> Rows:
        """Read all examples and hold them."""
        self.examples = list(self.read())
        return self

    def __len__(self) -> int:
        return len(self.examples or ())


HeldOut = dict[str, Rows]


def read_examples(config: TrainConfig) -> tuple[list[Rows], HeldOut]:
    """The data sets to train on and those held out; rows are read and checked, unless streamed or very large.

    Held out of the data are rows spread evenly over it, so that a file sorted in some way is held out fairly. What is held
    out has the names that eval_data gives; an empty one, if it gives none.

    Raises: UserError naming the file and line of a bad row, or if there is nothing to train on.
    """
    train = [_rows(config, part, number) for number, part in enumerate(data_parts(config))]
    for rows in train:
        if config.dataset_prepared_path and rows.source.kind == "hub":
            raise UserError(
                f"dataset_prepared_path keeps encoded rows of local data, but {rows.name} is a hub name: leave it out, or give a "
                "local copy of the data"
            )
        large = rows.is_large() and config.task == "sft"  # TRL holds all rows
        kept = large or config.dataset_prepared_path
        if not config.streaming and not kept and not rows.hold().examples:
            raise UserError(
                f"{rows.name}: holds no rows{_all_bad(rows)}, so there is nothing to train on: give other data"
            )
    if config.eval_data:
        return train, {name: _held_out(config, name, given) for name, given in eval_sets(config).items()}
    if config.eval_rows:
        (rows,) = train
        if rows.examples is None:
            rows.hold_out = config.eval_rows
            return train, {}
        count = number_held_out(len(rows.examples), config.eval_rows, rows.name)
        held_out, rows.examples = _spread(rows.examples, count)
        return train, {"": Rows(rows.name, rows.source, rows.parser, examples=held_out)}
    return train, {}


def number_held_out(num_examples: int, wanted: float, name: str) -> int:
    """How many of ``num_examples`` are held out: a number, or a share of them.

    Raises: UserError if it leaves nothing to train on.
    """
    count = max(1, round(wanted * num_examples)) if isinstance(wanted, float) else wanted
    if count >= num_examples:
        raise UserError(
            f"eval_rows={wanted} leaves nothing of the {num_examples} rows of {name} to train on: choose fewer"
        )
    return count


def data_parts(config: TrainConfig) -> list[dict[str, Any]]:
    """The data sets of ``config.data``, each with ``path`` and what else is said of it.

    Raises: UserError for one without a path, or with a key that is unknown.
    """
    if isinstance(config.data, str):
        return [{"path": config.data, "split": config.dataset_split, "config": config.dataset_config}]
    parts = [_part("data", part, PART_KEYS) for part in config.data]
    shares = [part.get("share") for part in parts]
    if len(parts) > 1 and any(not isinstance(s, int | float) or isinstance(s, bool) or not s > 0 for s in shares):
        raise UserError("data: give each of several data sets a share above 0, as in {path: a.jsonl, share: 0.7}")
    return parts


def _part(setting: str, given: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    if unknown := [key for key in given if key not in keys]:
        raise UserError(f"{setting}: '{shown(unknown[0])}' is not one of {', '.join(keys)}")
    if not isinstance(given.get("path"), str):
        raise UserError(f"{setting}: a data set needs a path, as in {{path: a.jsonl}}")
    for key in ("split", "config"):
        if given.get(key) is not None and not isinstance(given[key], str):
            raise UserError(f"{setting}: {key} must be a name, not {shown(given[key])}")
    return dict(given)


def _rows(config: TrainConfig, part: Mapping[str, Any], number: int) -> Rows:
    source = find_source(part["path"], split=part.get("split") or "train", config=part.get("config"))
    parser = parser_of(config, number)
    share = float(part.get("share") or 1.0)
    return Rows(part["path"], source, parser, config.on_bad_row, share, config.streaming)


def parser_of(config: TrainConfig, number: int = 0) -> RowParser:
    """How the rows of the data set ``number`` are read: by the task."""
    wanted = TASKS[config.task].columns
    if wanted:
        return JudgedParser(config.columns, config.roles, number, wanted)
    return RowParser(config.columns, config.roles, number)


def eval_sets(config: TrainConfig) -> dict[str, str | dict[str, Any]]:
    """Name to data of ``eval_data``; the name is empty if there is only one."""
    data = config.eval_data or {}
    return {"": data} if isinstance(data, str) or "path" in data else data


def _held_out(config: TrainConfig, name: str, given: Any) -> Rows:
    if not isinstance(given, str | dict):
        raise UserError(f"eval_data: {shown(name)} is {shown(given)}; give a path, or {{path: DIR, split: test}}")
    part = {"path": given} if isinstance(given, str) else _part("eval_data", given, EVAL_KEYS)
    source = find_source(part["path"], split=part.get("split") or HELD_OUT_SPLITS, config=part.get("config"))
    rows = Rows(part["path"], source, parser_of(config), config.on_bad_row).hold()
    if not rows.examples:
        raise UserError(f"{part['path']}: holds no rows to evaluate on{_all_bad(rows)}: give another eval_data")
    wanted: Any = part.get("rows", config.eval_rows)
    if (
        not isinstance(wanted, int | float)
        or isinstance(wanted, bool)
        or wanted < 0
        or (isinstance(wanted, float) and wanted >= 1)
    ):
        raise UserError(f"eval_data: rows {shown(wanted)}: give a number of rows, or a share below 1")
    most = max(1, round(wanted * len(rows))) if isinstance(wanted, float) else wanted
    rows.examples = _spread(rows.examples, most or len(rows))[0]
    return rows


def _all_bad(rows: Rows) -> str:
    return f" that can be used ({rows.bad[0]})" if rows.bad else ""


def spread(num_examples: int, count: int) -> set[int]:
    """``count`` of ``num_examples`` numbers, at even distances; all of them if there are no more.

    Example:
        >>> sorted(spread(9, 3)), sorted(spread(3, 9))
        ([0, 3, 6], [0, 1, 2])
    """
    count = min(count, num_examples)
    return {i * num_examples // count for i in range(count)}


def _spread(examples: list[Example], count: int) -> tuple[list[Example], list[Example]]:
    """``count`` examples at even distances, and the rest."""
    chosen = spread(len(examples), count)
    return [e for i, e in enumerate(examples) if i in chosen], [e for i, e in enumerate(examples) if i not in chosen]
