"""What the rows of the settings say about a whole config: refusals, and which settings play a part."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lisatune.errors import UserError
from lisatune.settings.config import ROWS, TrainConfig
from lisatune.settings.renamed import with_new_names


def refusals(config: TrainConfig, given: Collection[str]) -> Iterator[str]:
    """What is wrong with ``config``, a sentence each. ``given`` names the settings that the user has set."""
    for name in (name for name in ROWS if name in given):
        row = ROWS[name]
        if row.methods and config.method not in row.methods:
            yield f"{name} has no effect with method={config.method}: leave it out, or set method={row.methods[0]}"
        if row.tasks and config.task not in row.tasks:
            yield f"{name} has no effect with task={config.task}: leave it out, or set task={row.tasks[0]}"
        if row.optims and config.optim not in row.optims:
            yield f"{name} has no effect with optim={config.optim}: leave it out, or set optim={row.optims[0]}"
        for condition, text in row.only_with.items():
            if not holds(condition, config):
                yield f"{name} {text.format_map(vars(config))}"
    for name in (name for name in ROWS if is_on(name, config)):
        row, subject = ROWS[name], _subject(name, config)
        for condition, reason in row.idle_with.items():
            if holds(condition, config):
                yield f"{subject} has no effect with {condition}, {reason}: leave it out"
        for condition, reason in row.never_with.items():
            if holds(condition, config):
                other = condition.partition(" and ")[0]
                remedy = "" if ": " in reason else ": leave one of them out"
                yield f"{subject} cannot go with {other}{'' if reason[:1] in (':', '') else ', '}{reason}{remedy}"
        for condition, text in row.needs.items():
            if not holds(condition, config):
                text = text.format_map(vars(config))
                yield f"{name}{text}" if text.startswith("=") else f"{subject} {text}"
        if row.gpu and config.device == "cpu":
            yield f"{subject} has no effect on a CPU, {row.gpu}: leave it out"


def is_on(name: str, config: TrainConfig) -> bool:
    """Whether a setting asks for something: it has a value other than false, and is no word that is the default."""
    value = getattr(config, name)
    return not (value is None or value is False or (isinstance(value, str) and value == _default(name)))


def _default(name: str) -> Any:
    return TrainConfig.model_fields[name].default


def _subject(name: str, config: TrainConfig) -> str:
    """A setting in a sentence; a choice among words by its value too."""
    return f"{name}={getattr(config, name)}" if isinstance(_default(name), str) else name


WORD = re.compile(r"([\w.]+)(?:(!=|<=|<|=)(\S+))?")


def holds(condition: str, config: TrainConfig) -> bool:
    """Whether a condition of a row is true of ``config``; ``Row`` says how it is written.

    Example:
        >>> config = TrainConfig(model="m", data="d", output="o", max_steps=5)
        >>> holds("max_steps<=seed or packing=false and warmup_steps!=1", config)
        True
    """
    return any(all(_word_holds(word, config) for word in part.split(" and ")) for part in condition.split(" or "))


def _word_holds(word: str, config: TrainConfig) -> bool:
    match = WORD.fullmatch(word)
    assert match, f"'{word}' is no condition"
    name, operator, text = match.groups()
    name, _, fact = name.partition(".")
    value = getattr(_choice(name, config), fact) if fact else getattr(config, name)
    if operator is None:
        return bool(value)
    if operator in ("=", "!="):
        return (_spelled(value) == text) == (operator == "=")
    value, limit = (
        math.inf if number is None else number for number in (value, getattr(config, text))
    )  # None: left open
    return bool(value <= limit if operator == "<=" else value < limit)


def _choice(name: str, config: TrainConfig) -> Any:
    """What the choice that is made says about itself: a row of its registry."""
    find = ROWS[name].choices
    assert find is not None, f"{name} is no choice from a registry"
    return find(getattr(config, name))


def _spelled(value: Any) -> str:
    """A value as one types it."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return f"{value:g}" if isinstance(value, float) else str(value)


def plays(name: str, method: str) -> bool:
    """Whether a setting plays any part in ``method``."""
    return not ROWS[name].methods or method in ROWS[name].methods


def used_settings(config: TrainConfig) -> dict[str, Any]:
    """All settings that play a part, the defaults too."""

    def used(name: str) -> bool:
        optims, tasks = ROWS[name].optims, ROWS[name].tasks
        return (
            plays(name, config.method)
            and (not tasks or config.task in tasks)
            and (not optims or config.optim in optims)
            and all(holds(condition, config) for condition in ROWS[name].only_with)
        )

    return {name: value for name, value in config.model_dump().items() if used(name)}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings in which a run would not go on as it began, in words.

    Example:
        >>> differences({"seed": 0, "output": "a"}, {"seed": 1, "output": "b"})
        ['seed=1 (was 0)']
    """
    before = with_new_names(before, warn=False)
    # a run of an earlier version lacks newer settings; it did what is their default now
    was = {name: before.get(name, _default(name) if name in now else None) for name in ROWS}
    # what plays no part now and did before, follows from another setting that is told, or was written without an effect
    names = [name for name, row in ROWS.items() if not row.free and name in now and was[name] != now[name]]
    return [f"{name}={now[name]} (was {was[name]})" for name in names]


def check_num_ranks(config: TrainConfig, num_ranks: int) -> None:
    """Refuse what does not work on so many processes.

    Raises: UserError naming the setting.
    """
    if num_ranks == 1 < config.dp_shard_size:
        raise UserError(
            f"dp_shard_size={config.dp_shard_size} needs {config.dp_shard_size} processes, and one was started: start them with "
            "torchrun, or leave it out"
        )
    if num_ranks % config.dp_shard_size:
        raise UserError(
            f"dp_shard_size={config.dp_shard_size} does not divide the {num_ranks} processes that were started: choose 1, "
            f"{num_ranks} or a divisor"
        )
    if num_ranks == 1:
        if is_on("reduce_dtype", config):
            raise UserError("reduce_dtype has no effect on one process, which sums nothing: leave it out")
        return
    for name, value in used_settings(config).items():
        row = ROWS[name]
        whole = value in row.whole if isinstance(row.whole, tuple) else row.whole and is_on(name, config)
        if not whole and not (row.choices and _choice(name, config).whole):
            continue
        if config.dp_shard_size > 1:
            raise UserError(f"{name}={value} needs whole weights in each process: leave it out, or set dp_shard_size=1")
        if config.task != "sft":  # TRL's trainer joins the processes
            raise UserError(
                f"{name}={value} works on one process only with task={config.task}: leave it out, or start one process"
            )
