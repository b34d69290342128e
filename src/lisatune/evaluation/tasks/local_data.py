"""Data sets of tasks, read from a folder in the form in which lm-evaluation-harness gets them from the hub.

The tasks themselves (prompts, examples shown, metrics) stay the harness' own: only where their rows come from changes.
Needs neither torch nor the harness.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lisatune.data.formats import read_rows
from lisatune.errors import UserError

Columns = Mapping[str, Any]
Splits = dict[str, list[dict[str, Any]]]
LETTERS = "ABCDEFG"


def read_data_set(folder: Path, name: str, subset: str | None) -> Splits | None:
    """The rows of a hub data set, by split, from the files that stand for it in ``folder``.

    Args:
        folder: Holds ``gsm8k/``, ``pubmedqa/``, ``mmlu/``, ``agieval/`` or ``winogrande/``. Several files of a split
            (``test.even.jsonl.gz`` and ``test.odd.jsonl.gz``) are joined.
        name: Name of the data set, as a task names it: ``cais/mmlu``.
        subset: Part of the data set: ``anatomy``.
    Returns: None if no local form of this data set is known.
    Raises: UserError naming the file that is missing, or whose rows are not as they should be.
    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "mmlu").mkdir()
        >>> row = '{"subject": "anatomy", "question": "?", "choices": ["a", "b", "c", "d"], "answer": "C"}'
        >>> for file in ("dev", "val", "test"):
        ...     _ = (folder / "mmlu" / f"{file}.jsonl").write_text(row)
        >>> read_data_set(folder, "cais/mmlu", "anatomy")["test"]
        [{'question': '?', 'subject': 'anatomy', 'choices': ['a', 'b', 'c', 'd'], 'answer': 2}]
    """
    if name not in LOCAL:
        return None
    local = LOCAL[name]
    splits: Splits = {}
    for split, pattern in local.files.items():
        rows = []
        for where, columns in _read_files(folder, pattern):
            try:
                if local.keep(columns, split, subset):
                    rows.append(local.row(columns))
            except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
                raise UserError(
                    f"{where}: not a row of {name} ({type(error).__name__}: {error}); give its file as published"
                ) from error
        if not rows:
            raise UserError(f"{folder / pattern}: holds no rows of {subset or name}; give its file as published")
        splits[split] = rows
    return splits


def has_local_form(name: str | None) -> bool:
    """Whether the hub data set ``name`` can be read from files."""
    return name in LOCAL


def check_data_dir(folder: Path) -> None:
    """Refuse a folder that holds none of the data sets."""
    known = sorted({pattern.partition("/")[0] for local in LOCAL.values() for pattern in local.files.values()})
    if not any((folder / name).is_dir() for name in known):
        raise UserError(f"data folder {folder}: holds none of the folders {', '.join(known)}; give the one that does")


@dataclass(frozen=True)
class _Local:
    """Where a data set lies, and what becomes of a row of its file.

    Args:
        files: Split to the pattern of its files.
        row: Columns of the file to those of the hub.
        keep: Whether a row (columns, split, subset) is one of those asked for, where a file holds others too.
    """

    files: Mapping[str, str]
    row: Callable[[Columns], dict[str, Any]]
    keep: Callable[[Columns, str, str | None], bool] = lambda columns, split, subset: True


@lru_cache(maxsize=16)  # the 57 subjects of MMLU read the same three files
def _read_files(folder: Path, pattern: str) -> list[tuple[str, Columns]]:
    files = sorted(folder.glob(pattern))
    if not files:
        raise UserError(
            f"{folder / pattern}: no such file; put the data set's file there, or leave the data folder out"
        )
    if pattern.startswith("pubmedqa/"):
        return _read_pubmedqa(files, truth=sorted(folder.glob("pubmedqa/test_ground_truth*.json*")))
    return [(row.where, row.columns) for file in files for row in read_rows(str(file))]


def _read_pubmedqa(files: list[Path], truth: list[Path]) -> list[tuple[str, Columns]]:
    """PubMedQA's questions, an object by PMID; those of the test are the ones that ``truth`` names."""
    if not truth:
        raise UserError(f"{files[0].parent}: holds no test_ground_truth.json, which lists the test rows: put it there")
    test = {pmid for file in truth for pmid in _read_object(file)}
    return [
        (f"{file}, {pmid}", row | {"test": pmid in test}) for file in files for pmid, row in _read_object(file).items()
    ]


def _read_object(file: Path) -> dict[str, Any]:
    try:
        raw = file.read_bytes()
        found = json.loads(gzip.decompress(raw) if file.suffix == ".gz" else raw)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error}); give the file as published") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: not an object by PMID; give the file as published")
    return found


def _named(*names: str) -> Callable[[Columns], dict[str, Any]]:
    return lambda columns: {name: columns[name] for name in names}


def _mmlu(columns: Columns) -> dict[str, Any]:
    answer = columns["answer"]
    index = answer if isinstance(answer, int) else LETTERS.index(answer)
    if len(columns["choices"]) != 4 or index > 3:
        raise ValueError("a question must have four choices")
    return _named("question", "subject", "choices")(columns) | {"answer": index}


def _agieval(columns: Columns, *, with_passage: bool = True) -> dict[str, Any]:
    """The zero-shot prompt of AGIEval's authors (arXiv:2304.06364), which the hub's copies hold ready-made."""
    options = columns["options"]
    passage = (columns["passage"] or "") if with_passage else ""
    query = (
        f"{passage}Q: {columns['question']} Answer Choices: {' '.join(options)}\n"
        f"A: Among A through {LETTERS[len(options) - 1]}, the answer is"
    )
    return {"query": query, "choices": options, "gold": [LETTERS.index(columns["label"])]}


AGIEVAL = ("aqua-rat", "logiqa-en", "lsat-ar", "lsat-lr", "lsat-rc", "sat-en", "sat-math")
LOCAL: dict[str, _Local] = {
    "openai/gsm8k": _Local({"train": "gsm8k/train*.json*", "test": "gsm8k/test*.json*"}, _named("question", "answer")),
    "cais/mmlu": _Local(
        {"dev": "mmlu/dev*.json*", "validation": "mmlu/val*.json*", "test": "mmlu/test*.json*"},
        _mmlu,
        lambda columns, split, subset: columns["subject"] == subset,
    ),
    "bigbio/pubmed_qa": _Local(
        {"train": "pubmedqa/ori_pqal*.json*", "test": "pubmedqa/ori_pqal*.json*"},
        _named("QUESTION", "CONTEXTS", "final_decision"),
        lambda columns, split, subset: columns["test"] == (split == "test"),
    ),
    "allenai/winogrande": _Local(
        {"train": "winogrande/train*.json*", "validation": "winogrande/dev*.json*"},
        _named("sentence", "option1", "option2", "answer"),
    ),
    **{f"hails/agieval-{part}": _Local({"test": f"agieval/{part}.*json*"}, _agieval) for part in AGIEVAL},
    "hails/agieval-sat-en-without-passage": _Local(
        {"test": "agieval/sat-en.*json*"}, lambda columns: _agieval(columns, with_passage=False)
    ),
}
