"""What can be found wrong with a run before torch is imported, so that a mistake is answered at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lisatune.config import LAYERWISE, TrainConfig
from lisatune.data.formats import Example, find_files, parse_row, read_rows
from lisatune.errors import UserError, did_you_mean
from lisatune.files import LOCK, checkpoint_steps, only_run
from lisatune.launch import number_started

HeldOut = dict[str, list[Example]]


def check_output(folder: Path, *, resume: bool = False, held: bool = False) -> None:
    """Refuse an output folder that holds anything, unless it is a run to go on with: nothing is overwritten.

    ``held`` says that this process holds it already (``only_run``).
    """
    try:
        _check_output(folder, resume, held)
    except OSError as error:
        raise UserError(f"output folder {folder} cannot be used ({error.strerror or error}): choose another") from error


def _check_output(folder: Path, resume: bool, held: bool) -> None:
    if folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
        link = next((path for path in folder.iterdir() if path.is_symlink()), None)
        if link is not None:
            raise UserError(f"{link} is a link, which a run would write through: put the file or folder itself there")
        if not (folder / "config.yaml").is_file():
            raise UserError(
                f"output folder {folder} is not empty, and holds no run: choose another, or remove it first"
            )
        if not resume:
            raise UserError(f"output folder {folder} already holds {describe_run(folder)}, or choose another output")
        if not held:
            with only_run(folder):
                pass  # a run that is under way is told of at once
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file: choose a folder")
    parent = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"output folder {folder} cannot be made in {parent}: choose a place where you may write")


def describe_run(folder: Path) -> str:
    """What became of the run in ``folder``, and how to go on."""
    if (folder / "summary.json").is_file():
        return "a finished run: report on it with lisatune report"
    steps = checkpoint_steps(folder)
    stopped = f"a run that was stopped after step {steps[0]:,} or later" if steps else "a run that was stopped early"
    return f"{stopped}: go on with it by adding --resume"


def finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished run; None if there is no such run.

    Raises: UserError if it cannot be read.
    """
    path = folder / "summary.json"
    if not path.is_file():
        return None
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it to go on with the run") from error
    return summary


def check_model_name(name: str) -> None:
    """Refuse a path at which no model lies, or one of pickled weights; costs a look at the folder. Hub names pass."""
    try:
        _check_model_name(name)
    except (OSError, RuntimeError) as error:  # a name too long, a folder that may not be read, ~ of an unknown user
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name}: cannot be looked up ({reason}); give the path of a model's folder") from error


def _check_model_name(name: str) -> None:
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return
    if path.is_dir():
        if not (path / "config.json").is_file():
            inner = path / "model" / "config.json"
            hint = f"; did you mean {path / 'model'}?" if inner.is_file() else ": give one saved by save_pretrained"
            raise UserError(f"{name}: the folder holds no config.json, so it is no Hugging Face model{hint}")
        if any(path.glob("*.bin")) and not any(path.glob("*.safetensors")):
            raise UserError(
                f"{name}: the weights are pickled (.bin), and unpickling can run code: save them as safetensors first, with "
                "save_pretrained"
            )
        return
    if path.is_file():
        raise UserError(f"{name}: a model is a Hugging Face folder, a .gguf file or a hub name, not such a file")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf"):
        nearby = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{name}: no such model folder or file{did_you_mean(path.name, nearby)}")


def check_num_active(config: TrainConfig) -> None:
    """Refuse more active layers than a local model's config.json says there are; other models are checked when loaded."""
    file = Path(config.model).expanduser() / "config.json"
    if config.method not in LAYERWISE or config.sampled_unit != "layers" or not file.is_file():
        return
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        num_layers = {**settings, **settings.get("text_config", {})}.get("num_hidden_layers")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is not the config.json of a model ({error})") from error
    if isinstance(num_layers, int) and config.num_active > num_layers:
        raise UserError(
            f"num_active is {config.num_active}, but the model has {num_layers} decoder layers: choose 1 to {num_layers}"
        )


def check_export(run: str, *, dtype: str | None, delta: bool, gguf: str | None, push_to: str | None) -> None:
    """Refuse what cannot be exported, or not like that."""
    folder = Path(run).expanduser()
    if not (folder / "delta.json").is_file():
        inside = folder / "model"
        check_model_name(str(inside) if inside.is_dir() else run)
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {dtype}: choose float32, bfloat16 or float16")
    if delta and gguf is not None:
        raise UserError("--delta and --gguf cannot go together: a GGUF file is a whole model")
    if dtype is not None and (delta or gguf is not None):
        raise UserError("--dtype is of a plain folder: leave it out; a delta has the run's, and --gguf names its own")
    if push_to is not None and gguf is not None:
        raise UserError("--push-to uploads a folder: leave out --gguf")


def check_eval_tasks(config: TrainConfig) -> None:
    """Refuse tasks that there are not, or whose package is not installed."""
    if config.eval_tasks:
        from lisatune.tasks.harness import find_tasks, task_names

        find_tasks(task_names(config.eval_tasks), data_folder(config))


def data_folder(config: TrainConfig) -> Path | None:
    """Where the data of ``eval_tasks`` are, if not on the hub."""
    return Path(config.eval_data_dir).expanduser() if config.eval_data_dir else None


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
        find_files(config.data, config=config.dataset_config)  # what cannot be is told of now
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
    rows = [parse_row(row) for row in read_rows(data, split="test")]
    if not rows:
        raise UserError(f"{data}: holds no rows to evaluate on")
    return _spread(rows, most or len(rows))[0]


def _spread(examples: list[Example], count: int) -> tuple[list[Example], list[Example]]:
    """``count`` examples at even distances, and the rest."""
    chosen = {i * len(examples) // count for i in range(min(count, len(examples)))}
    return [e for i, e in enumerate(examples) if i in chosen], [e for i, e in enumerate(examples) if i not in chosen]


def preflight(config: TrainConfig, *, resume: bool = False) -> tuple[Iterable[Example], HeldOut]:
    """Every check that needs no torch, then the examples to train on and those held out."""
    # one of several processes holds the folder for all; if each tried, they would take one another for another run
    check_output(Path(config.output), resume=resume, held=number_started() > 0)
    check_model_name(config.model)
    check_num_active(config)
    check_eval_tasks(config)
    return read_examples(config)
