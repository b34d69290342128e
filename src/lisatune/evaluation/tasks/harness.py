"""Tasks of lm-evaluation-harness by their names, with data from the hub or from a folder. Needs no torch to find them."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lisatune.errors import UserError, did_you_mean, missing_package
from lisatune.evaluation.tasks.local_data import check_data_dir, has_local_form, read_data_set

ASKED = "asked"  # name of the group that holds what was asked for
# where the usual tasks stand: reading these takes a tenth of a second, and all 14,000 take ten
USUAL_FOLDERS = ("gsm8k", "pubmedqa", "mmlu/default", "agieval", "winogrande")


def task_names(given: str | Iterable[str]) -> list[str]:
    """Names from ``a,b`` or a list of such, each once.

    Raises: UserError if there is none.
    Example:
        >>> task_names("gsm8k, mmlu,gsm8k")
        ['gsm8k', 'mmlu']
    """
    words = [given] if isinstance(given, str) else given
    names = list(dict.fromkeys(name for word in words for part in str(word).split(",") if (name := part.strip())))
    if not names:
        raise UserError("no task is named: give for example --tasks gsm8k,mmlu (eval_tasks while training)")
    return names


def find_tasks(names: Sequence[str], data_dir: Path | None = None) -> Any:
    """The harness' ``TaskManager`` that knows ``names``; nothing is downloaded.

    Raises: UserError for a name that no task has, with the nearest; if the harness is not installed; or for a folder
        ``data_dir`` that holds no data of tasks.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise missing_package("lm-eval", "scoring tasks", "eval")
    if data_dir is not None:
        check_data_dir(data_dir)
    manager = _manager(usual=True)
    if all(name in manager.task_index for name in names):
        return manager
    manager = _manager(usual=False)
    for name in names:
        if name not in manager.task_index:
            raise UserError(f"task '{name}': lm-evaluation-harness has no such task{_nearest(name, manager)}")
    return manager


def load_tasks(names: Sequence[str], data_dir: Path | None = None) -> Any:
    """A group of the harness, named ``asked``, whose children are the tasks and groups ``names`` with their data.

    Args:
        names: Names of tasks, as the harness has them.
        data_dir: Where a data set has a form of files (see ``read_data_set``), it is read from there and not from the hub.
    Raises: UserError as ``find_tasks``; for data that cannot be had, with what would help; for a task that runs the code
        which a model writes.
    """
    manager = find_tasks(names, data_dir)
    from lm_eval.api.group import Group

    asked = Group(ASKED)
    with quiet_harness():
        for name in names:
            leaves = [leaf for leaf in _leaves(name, manager.task_index) if has_local_form(_data_set(leaf))]
            try:
                if data_dir is not None:
                    manager.task_index.update({leaf.name: _from_folder(leaf, data_dir) for leaf in leaves})
                loaded = manager.load([name])
            except UserError:
                raise
            except Exception as error:  # the hub, the network and datasets raise many kinds, none of them ours
                raise UserError(_out_of_reach(name, bool(leaves), data_dir, error)) from error
            finally:
                manager.task_index.update({leaf.name: leaf for leaf in leaves})
            for child in [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values():
                asked.add(child)
    for task in asked.get_all_tasks():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"task '{task.task_name}' runs code that the model writes, so it is refused: leave it out")
    return asked


@lru_cache(maxsize=2)
def _manager(*, usual: bool) -> Any:
    """The harness' index of the usual tasks, or of all."""
    import lm_eval.tasks

    with quiet_harness():
        if not usual:
            return lm_eval.tasks.TaskManager()
        root = Path(lm_eval.tasks.__file__).parent
        return lm_eval.tasks.TaskManager(include_path=[root / f for f in USUAL_FOLDERS], include_defaults=False)


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep the harness' notes on each task out of the terminal."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _leaves(name: str, index: Mapping[str, Any]) -> Iterator[Any]:
    """The entries of the single tasks that ``name`` stands for."""
    entry = index.get(name)
    if entry is None:
        return
    if entry.kind.name not in ("GROUP", "TAG"):
        yield entry
        return
    members = entry.tags if entry.kind.name == "TAG" else (entry.cfg or {}).get("task") or ()
    for member in members:
        inner = member if isinstance(member, str) else member.get("group") or member.get("task")
        if isinstance(inner, str):
            yield from _leaves(inner, index)


def _data_set(entry: Any) -> str | None:
    return (entry.cfg or {}).get("dataset_path")


def _from_folder(entry: Any, folder: Path) -> Any:
    """The harness' own task of ``entry``, with its rows from ``folder``."""
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks.manager import load_yaml

    class LocalTask(ConfigurableTask):  # type: ignore[misc]
        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__(config={name: value for name, value in config.items() if name != "class"})

        def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
            splits = read_data_set(folder, self.DATASET_PATH, self.DATASET_NAME)
            assert splits is not None
            self.dataset = DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})

    return replace(entry, yaml_path=None, cfg=load_yaml(entry.yaml_path) | {"class": LocalTask})


def _nearest(name: str, manager: Any) -> str:
    """A hint; the plain names of benchmarks come before the thousands of their parts."""
    return did_you_mean(name, [n for n in manager.all_tasks if "_" not in n]) or did_you_mean(name, manager.all_tasks)


def _out_of_reach(name: str, local: bool, data_dir: Path | None, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if local and data_dir is None:
        remedy = "give --data-dir, a folder that holds its files (eval_data_dir while training)"
    elif local:
        remedy = "name those of its parts whose files are there (of agieval, agieval_nous)"
    else:
        remedy = "connect to the hub once, so that it is kept in its cache, or leave the task out"
    return f"task '{name}': its data cannot be had ({reason}); {remedy}"
