"""Judged answers as TRL takes them, and what became of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from lisatune.data.examples import HeldOut, Rows
from lisatune.data.preferences import Judged
from lisatune.errors import UserError, missing_package
from lisatune.processes.collectives import barrier, gathered, rank, together
from lisatune.tasks import TASKS

WHERE = "where"  # the column with the place of a row, which TRL leaves alone


def as_dataset(rows: Rows, task: str) -> Any:
    """The rows as a data set of ``datasets``.

    Raises: UserError if some have a margin and others have none; MissingPackageError without datasets.
    """
    try:
        from datasets import Dataset
    except ImportError as error:
        raise missing_package("datasets", f"task={task}", "sft") from error
    judged: list[Judged] = list(rows.examples or ())  # type: ignore[arg-type]
    without = [example for example in judged if example.margin is None]
    if "margin" in TASKS[task].columns and 0 < len(without) < len(judged):
        raise UserError(f"{without[0].where}: 'margin' is missing, but other rows have one: give each row one, or none")
    with_tools = any(example.tools for example in judged)
    tools = [{"tools": json.dumps(list(e.tools)) if e.tools else None} if with_tools else {} for e in judged]
    return Dataset.from_list([e.as_row() | own | {WHERE: e.where} for e, own in zip(judged, tools, strict=True)])


def in_one_place(dataset: Any, folder: str, name: str) -> Any:
    """The data set from a file that all processes read: TRL keeps next to it what one of them computes for all.

    Args:
        dataset: The same on each process.
        folder: One that is there; that of rank 0 is taken.
        name: Of the data set, another for each.
    Raises: UserError on a host that does not see the folder.
    """
    from datasets import load_from_disk

    place = Path(gathered(folder)[0]) / name
    if rank() == 0:
        dataset.save_to_disk(place)
    barrier()
    with together():
        if not place.is_dir():
            raise UserError("precompute_ref_log_probs=true works on one host only: leave it out, or use one host")
    return load_from_disk(place)


def identity_of(train: Rows, held_out: HeldOut) -> dict[str, str]:
    """What the rows are recognised by when the run is resumed."""
    sets = {"train": train, **{f"held-out {name}".strip().replace(" ", "-"): rows for name, rows in held_out.items()}}
    return {name: f"{len(rows):,} rows, {_digest(rows)}" for name, rows in sets.items()}


def _digest(rows: Rows) -> str:
    return hashlib.sha256(repr([(e.messages, repr(e)) for e in rows.examples or ()]).encode()).hexdigest()[:16]


def tell_rows(name: str, rows: Rows, used: int, console: Console) -> None:
    """Tell which files were read, and how many rows are used; name what is not.

    Raises: UserError if no row is left.
    """
    examples = rows.examples or []
    left_out: Mapping[str, None] = dict.fromkeys(column for example in examples for column in example.left_out)
    parts = [f"{used:,} of {len(examples) + len(rows.bad):,} rows are used"]
    if rows.bad:
        parts.append(f"{len(rows.bad):,} cannot be used ({rows.bad[0]})")
    if used < len(examples):
        parts.append(f"{len(examples) - used:,} are longer than max_length")
    if left_out:
        parts.append(f"left out: {', '.join(left_out)}")
    told = (f"{name}: {rows.source.describe()}", f"{name}: {'; '.join(parts)}")
    for line in told:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if used == 0:
        raise UserError(f"{rows.name}: no row is within max_length: raise it")
