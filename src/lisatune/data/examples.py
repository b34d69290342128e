"""The rows of a run: those to learn from, and those held out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from lisatune.data.files import HELD_OUT_SPLITS, find_source
from lisatune.data.formats import Example, parse_row, read_rows
from lisatune.errors import UserError

if TYPE_CHECKING:
    from lisatune.settings import TrainConfig

HeldOut = dict[str, list[Example]]


class ExampleStream:
    """Examples read anew from the disk or the hub each time they are iterated."""

    def __init__(self, data: str, split: str, config: str | None) -> None:
        self.data = data
        self.split = split
        self.config = config

    def __iter__(self) -> Iterator[Example]:
        return (parse_row(row) for row in read_rows(self.data, split=self.split, config=self.config, streaming=True))


def read_examples(config: TrainConfig) -> tuple[Iterable[Example], HeldOut]:
    """The examples to train on and those held out; all read and checked, unless streamed.

    Held out of the data are rows spread evenly over it, so that a file sorted in some way is held out fairly. What is held
    out has the names that eval_data gives; an empty one, if it gives none.

    Raises: UserError naming the file and line of a bad row, or if there is nothing to train on.
    """
    if config.streaming:
        find_source(
            config.data, split=config.dataset_split, config=config.dataset_config
        )  # what cannot be is told of now
        train: Iterable[Example] = ExampleStream(config.data, config.dataset_split, config.dataset_config)
    else:
        rows = read_rows(config.data, split=config.dataset_split, config=config.dataset_config)
        train = [parse_row(row) for row in rows]
        if not train:
            raise UserError(f"{config.data}: holds no rows, so there is nothing to train on")
    if config.eval_data:
        return train, {name: _read_held_out(data, config.eval_rows) for name, data in eval_sets(config).items()}
    if config.eval_rows:
        assert isinstance(train, list)
        if config.eval_rows >= len(train):
            raise UserError(
                f"eval_rows={config.eval_rows} leaves nothing of the {len(train)} rows of {config.data} to train on"
            )
        held_out, train = _spread(train, config.eval_rows)
        return train, {"": held_out}
    return train, {}


def eval_sets(config: TrainConfig) -> Mapping[str, str]:
    """Name to file of ``eval_data``; the name is empty if there is only one."""
    data = config.eval_data or {}
    return {"": data} if isinstance(data, str) else data


def _read_held_out(data: str, most: int) -> list[Example]:
    rows = [parse_row(row) for row in read_rows(data, split=HELD_OUT_SPLITS)]
    if not rows:
        raise UserError(f"{data}: holds no rows to evaluate on")
    return _spread(rows, most or len(rows))[0]


def _spread(examples: list[Example], count: int) -> tuple[list[Example], list[Example]]:
    """``count`` examples at even distances, and the rest."""
    chosen = {i * len(examples) // count for i in range(min(count, len(examples)))}
    return [e for i, e in enumerate(examples) if i in chosen], [e for i, e in enumerate(examples) if i not in chosen]
