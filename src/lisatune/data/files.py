"""Which files a data set's name stands for, and what became of each. Needs no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import yaml

from lisatune.errors import UserError, did_you_mean

JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
CSV_SUFFIXES = (".csv", ".csv.gz")
SUFFIXES = (*JSON_SUFFIXES, *CSV_SUFFIXES, ".parquet")
ABOUT_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")  # written by datasets
# the words by which the Hugging Face hub tells splits apart, in a file's or a folder's name
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
HELD_OUT_SPLITS = ("test", "validation")  # a folder for evaluation is read by the first of these that it has
MAX_SHOWN, MAX_SHOWN_LETTERS = 12, 60  # names in a message, and letters of each


@dataclass
class DataFile:
    """A file below the data's folder.

    Attributes:
        path: Where it is.
        split: ``train``, ``test``, ... by its name or its folder's; None where neither says.
        config: The configuration (subset) that it belongs to; empty where the folder has none.
        left_out: Why it is not read; empty if it is.
        num_rows: Rows that were read from it so far.
        note: What of its inside was read, and what was not; empty for a plain file of rows.
    """

    path: Path
    split: str | None = None
    config: str = ""
    left_out: str = ""
    num_rows: int = 0
    note: str = ""


@dataclass
class Source:
    """What ``data`` stands for: files, a folder that ``save_to_disk`` made, or a data set of the hub."""

    data: str
    kind: Literal["files", "saved", "hub"]
    split: str
    config: str | None = None
    files: list[DataFile] = field(default_factory=list)
    num_rows: int = 0

    @property
    def read(self) -> list[DataFile]:
        """The files that are read, in order."""
        return [file for file in self.files if not file.left_out]

    @property
    def told(self) -> list[DataFile]:
        """The files that are read; what ``save_to_disk`` made, or is on the hub, counts as one."""
        return (
            self.read
            if self.kind == "files"
            else [DataFile(Path(self.data), self.split, self.config or "", num_rows=self.num_rows)]
        )

    @property
    def paths(self) -> list[Path]:
        """The files that hold the rows; none for a name of the hub."""
        if self.kind != "saved":
            return [file.path for file in self.read]
        folder = Path(self.data).expanduser()
        return sorted((folder / self.split if (folder / "dataset_dict.json").is_file() else folder).glob("*.arrow"))

    def describe(self) -> str:
        """What is read and what is not, in one line."""
        if self.kind != "files":
            config = f", configuration {self.config}" if self.config else ""
            return f"{self.data}: split {self.split}{config}"
        base = Path(self.data).expanduser()
        read, left_out = self.read, [file for file in self.files if file.left_out]
        notes = "".join(f"; {shown(file.path.name)}: {file.note}" for file in read[:MAX_SHOWN] if file.note)
        if not base.is_dir():
            return f"{self.data}: 1 file{notes}"
        config = f", configuration {self.config}" if self.config else ""
        split = f", split {self.split}" if any(file.split for file in self.files) else ""
        text = f"{self.data}: {_files(len(read))}{split}{config} ({_listed(base, read)})"
        if left_out:
            text += f"; left out: {_listed(base, left_out, why=True)}"
        return text + notes


def _files(number: int) -> str:
    return f"{number:,} file" + "s" * (number != 1)


def _listed(base: Path, files: Sequence[DataFile], *, why: bool = False) -> str:
    names = [
        shown(file.path.relative_to(base).as_posix()) + (f" ({file.left_out})" if why else "")
        for file in files[:MAX_SHOWN]
    ]
    more = f" and {len(files) - MAX_SHOWN:,} more" if len(files) > MAX_SHOWN else ""
    return ", ".join(names) + more


def shown(name: Any) -> str:
    """A name of the data in a message to the user: one line that any terminal can print, and not a long one."""
    text = str(name)[:MAX_SHOWN_LETTERS]
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(str(name)) <= MAX_SHOWN_LETTERS else f"{text}..."


def find_source(data: str, *, split: str | Sequence[str] = "train", config: str | None = None) -> Source:
    """What ``data`` stands for; looks at folders, reads no row.

    Args:
        data: A file, a folder, or a name of the hub.
        split: The split to read; of several, the first that is there.
        config: The configuration, where there are several.
    Raises: UserError if there is nothing of that name, or a split or a configuration that it does not have.
    """
    wanted = (split,) if isinstance(split, str) else tuple(split)
    try:
        found = _local(data)
        if found is None:
            return Source(data, "hub", wanted[0], config)
        if found.is_file():
            _refuse_parts(data, split, config, "is one file")
            return Source(data, "files", wanted[0], files=[DataFile(found)])
        if splits := _saved_splits(found):
            _refuse_parts(data, "train", config, "has none")
            return Source(data, "saved", _choose_split(data, wanted, splits))
        return _folder_source(data, found, split, config)
    except (OSError, RuntimeError) as error:  # a name too long, a folder that may not be read, ~ of an unknown user
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{shown(data)}: cannot be looked up ({reason}); give the path of a file or folder") from error


def find_files(data: str, *, split: str | Sequence[str] = "train", config: str | None = None) -> list[Path] | None:
    """The files that are read of ``data``, or None for a name of the hub or a folder made by ``save_to_disk``."""
    source = find_source(data, split=split, config=config)
    return [file.path for file in source.read] if source.kind == "files" else None


def _local(data: str) -> Path | None:
    """The file or folder that ``data`` names; None for a name of the hub."""
    if not data.strip():
        raise UserError("the data's name is empty: give a file, a folder or a hub name")  # Path("") is where we stand
    path = Path(data).expanduser()
    if path.is_dir() or path.is_file():
        return path
    if path.exists() or _looks_like_path(data):
        if hint := _not_a_path(data):
            raise UserError(f"{data}: no such file or folder; {hint}")
        nearby = [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{data}: no such file or folder{did_you_mean(path.name, nearby)}")
    return None


def _not_a_path(data: str) -> str:
    """What to do about a name that other tools take and that is no file here."""
    if "://" in data:
        return "it is an address: download it, and give the file"
    if "*" in data or "?" in data:
        return "patterns are not followed: give the folder"
    if all(Path(part.strip()).exists() for part in data.split(",")):
        return "give several as a list with shares: [{path: a.jsonl, share: 0.7}, {path: b.jsonl, share: 0.3}]"
    return ""


def _looks_like_path(data: str) -> bool:
    return data.startswith((".", "/", "~")) or data.count("/") != 1 or suffix_of(Path(data)) is not None


def suffix_of(path: Path) -> str | None:
    """The suffix by which ``path`` is read; None if it is of no known kind."""
    name = path.name.lower()
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(s)), None)


def _refuse_parts(data: str, split: str | Sequence[str], config: str | None, why: str) -> None:
    """Refuse a split or configuration of data that have none."""
    if isinstance(split, str) and split != "train":
        raise UserError(
            f"dataset_split={shown(split)} needs a hub data set or a folder with splits, but {data} {why}: "
            "leave it out, or give the split's file"
        )
    if config is not None:
        raise UserError(
            f"dataset_config={shown(config)} needs a hub data set or a folder with several, but {data} {why}: leave it out"
        )


def _choose_split(data: str, wanted: Sequence[str], there: Sequence[str]) -> str:
    found = next((split for split in wanted if split in there), None)
    if found is None:
        raise UserError(
            f"{data}: has no split {' or '.join(shown(s) for s in wanted)}, but {', '.join(map(shown, there))}: set "
            f"dataset_split={shown(there[0])}, or give that split's file as the data"
        )
    return found


# -- folders ---------------------------------------------------------------------------------------------------------


def _saved_splits(folder: Path) -> list[str]:
    """The splits of a folder that ``datasets``' ``save_to_disk`` made; none if it is no such folder."""
    if (folder / "dataset_dict.json").is_file():
        return sorted(child.name for child in folder.iterdir() if (child / "state.json").is_file())
    return ["train"] if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file() else []


def _folder_source(data: str, folder: Path, split: str | Sequence[str], config: str | None) -> Source:
    files = [_as_data_file(folder, path) for path in _walk(folder)]
    rows = [file for file in files if not file.left_out]
    if not rows:
        others = f" (but {_listed(folder, files)})" if files else ""
        raise UserError(f"{folder}: the folder holds no {', '.join(JSON_SUFFIXES)}, .parquet or .csv file{others}")
    declared = _declared(folder)
    if any(one.patterns for one in declared):
        _follow_declaration(folder, rows, declared)
        rows = [file for file in rows if not file.left_out]
    chosen = _choose_config(data, rows, declared, config)
    split = _leave_out_splits(data, [file for file in rows if not file.left_out], split)
    return Source(data, "files", split, chosen or None, files)


def _walk(folder: Path) -> list[Path]:
    """Every file below ``folder``, by name; one that cannot be read is an error, where ``rglob`` passes it by."""

    def refuse(error: OSError) -> None:
        raise error

    files = []
    for place, subfolders, names in os.walk(folder, onerror=refuse):
        for name in subfolders:
            if (link := Path(place, name)).is_symlink():
                raise UserError(
                    f"{link}: a link to another folder is not followed; remove it, or give that folder as the data"
                )
        files += [Path(place, name) for name in names]
        files += [Path(place, name) for name in subfolders if name.startswith(".")]  # told, not walked
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
    return sorted(files)


def _as_data_file(folder: Path, path: Path) -> DataFile:
    if path.name.startswith("."):
        return DataFile(path, left_out="hidden")
    if path.name in ABOUT_DATA:
        return DataFile(path, left_out="about the data set")
    if suffix_of(path) is None:
        return DataFile(path, left_out="not a file of rows")
    split, config = _split_and_config(path.relative_to(folder))
    return DataFile(path, split, config)


def _split_and_config(path: Path) -> tuple[str | None, str]:
    """The split that a path below the data's folder tells, and the folder above it, as the hub reads such paths.

    Example:
        >>> _split_and_config(Path("main/train-00000-of-00001.parquet"))
        ('train', 'main')
        >>> _split_and_config(Path("en/dev/part1.jsonl"))
        ('validation', 'en')
        >>> _split_and_config(Path("rows/a.jsonl"))
        (None, '')
    """
    parts = path.parts
    for depth in range(len(parts) - 1, -1, -1):
        if split := _split_in(parts[depth]):
            above = [part for part in parts[:depth] if part.lower() != "data"]
            return split, "/".join(above)
    return None, ""


def _split_in(name: str) -> str | None:
    """The split that one name tells; ``train_sft-00000-of-00003`` is the split ``train_sft``."""
    words = re.split(r"[-._ 0-9]+", name.lower())
    found = next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)
    shard = re.match(r"(\w+)-\d{5}-of-\d{5}", name)
    return shard[1] if found and shard else found


@dataclass(frozen=True)
class _Config:
    """A configuration that a folder's ``README.md`` declares, with the (split, pattern) of its files, as on the hub."""

    name: str
    is_default: bool
    patterns: tuple[tuple[str, str], ...]


def _declared(folder: Path) -> list[_Config]:
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        head = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else None
    except (OSError, ValueError, IndexError, yaml.YAMLError, RecursionError):
        return []
    configs = head.get("configs") if isinstance(head, dict) else None
    return [
        _Config(one["config_name"], one.get("default") is True, tuple(_patterns(one.get("data_files"))))
        for one in (configs if isinstance(configs, list) else ())
        if isinstance(one, dict) and isinstance(one.get("config_name"), str)
    ]


def _patterns(given: Any) -> Iterator[tuple[str, str]]:
    for item in given if isinstance(given, list) else [given]:
        split, paths = (item.get("split", "train"), item.get("path")) if isinstance(item, dict) else ("train", item)
        for path in paths if isinstance(paths, list) else [paths]:
            if isinstance(path, str):
                yield str(split), path.removeprefix("./")


def _follow_declaration(folder: Path, files: Sequence[DataFile], declared: Sequence[_Config]) -> None:
    for file in files:
        name = file.path.relative_to(folder).as_posix()
        named = [(one.name, split) for one in declared for split, pattern in one.patterns if fnmatch(name, pattern)]
        if named:
            file.config, file.split = named[0]
        else:
            file.left_out = "not named in README.md"


def _choose_config(data: str, files: Sequence[DataFile], declared: Sequence[_Config], config: str | None) -> str:
    """Leave out what is of another configuration than ``config``, or than the one that must be meant."""
    there = sorted({file.config for file in files if file.split})
    if config is None and len(there) > 1:
        meant = [one.name for one in declared if one.is_default or len(declared) == 1 or one.name == "default"]
        if not meant or meant[0] not in there:
            listed = ", ".join(shown(name) or "(none)" for name in there)
            raise UserError(
                f"{data}: holds several configurations ({listed}): set dataset_config={shown(there[-1])}, or give one folder or "
                "file as the data"
            )
        config = meant[0]
    if config is None:
        return there[0] if there else ""
    if config not in there:
        if not there or there == [""]:
            _refuse_parts(data, "train", config, "is on this machine and has none")
        raise UserError(
            f"{data}: has no configuration {shown(config)}, but {', '.join(map(shown, there))}: set dataset_config={shown(there[0])}"
        )
    for file in files:
        if file.config != config:
            file.left_out = f"configuration {shown(file.config)}" if file.config else "of no configuration"
    return config


def _leave_out_splits(data: str, files: Sequence[DataFile], split: str | Sequence[str]) -> str:
    """Leave out what is of another split; a file whose name tells none is for training where others tell theirs."""
    wanted = (split,) if isinstance(split, str) else tuple(split)
    if not any(file.split for file in files):
        _refuse_parts(data, split, None, "names none")
        return wanted[0]
    there = sorted({file.split or "train" for file in files}, key=lambda name: (name != "train", name))
    chosen = _choose_split(data, wanted, there)
    for file in files:
        if (file.split or "train") != chosen:
            file.left_out = f"split {shown(file.split or 'train')}"
    return chosen
