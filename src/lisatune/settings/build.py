"""A config from settings: names, types, values, then what the rows of the settings refuse."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from lisatune.errors import UserError, did_you_mean, shown
from lisatune.methods import METHODS, UNITS, MethodChoice, usual_unit
from lisatune.settings.config import ROWS, TrainConfig
from lisatune.settings.hints import hint_for
from lisatune.settings.renamed import with_new_names
from lisatune.settings.rules import holds, refusals
from lisatune.tasks import TASKS, TaskChoice

UNPRINTED = ("Cc", "Cs", "Zl", "Zp")  # categories: control, half of a surrogate pair, line and paragraph separator


def build_config(settings: Mapping[str, Any]) -> TrainConfig:
    """Check ``settings`` and fill in what they leave out; null is as if a setting were left out, so it takes one back.

    Raises: UserError for a misspelt or missing name, a value out of range, or a setting that would have no effect.
    Example:
        >>> build_config({"model": "m", "data": "d", "output": "o", "num_active": "4"}).num_active
        4
        >>> build_config({"model": "m", "data": "d", "output": "o", "num_activ": 4})
        Traceback (most recent call last):
        lisatune.errors.UserError: unknown setting 'num_activ'; did you mean 'num_active'?
    """
    settings = with_new_names(settings)
    for name in settings:
        if name not in TrainConfig.model_fields:
            hint = (hint_for(name) or did_you_mean(name, TrainConfig.model_fields)) if isinstance(name, str) else ""
            raise UserError(f"unknown setting {shown(name)}{hint}")
    settings = {name: value for name, value in settings.items() if value is not None}
    try:
        method = settings.get("method")
        recipe = {} if "sampled_unit" in settings else usual_unit(settings)
        unit = (recipe | settings).get("sampled_unit")
        # what is usual for the unit that is sampled, then for the method, then for the task; the user's own win
        preset = {**recipe, **_preset(UNITS, unit), **_preset(METHODS, method), **_preset(TASKS, settings.get("task"))}
        config = TrainConfig.model_validate(preset | dict(settings))
        for name in _preset(UNITS, unit).keys() - settings.keys():  # it gives way to what was asked for
            if any(holds(condition, config) for condition in ROWS[name].never_with):
                config = config.model_copy(update={name: TrainConfig.model_fields[name].default})
        config = TrainConfig.model_construct(set(settings), **dict(config))  # a preset counts as left out
    except ValidationError as error:
        raise UserError(_in_words(error)) from error
    for name, value in config:
        if isinstance(settings.get(name), bool) and type(value) in (int, float):
            raise UserError(f"{name}={settings[name]}: input should be a number")  # pydantic takes true for 1
        _refuse_unusable(name, value)
    if refusal := next(refusals(config, settings), "") or _of_data(config, settings):
        raise UserError(refusal)
    return config


def _preset(registry: Mapping[str, MethodChoice] | Mapping[str, TaskChoice], name: Any) -> Mapping[str, Any]:
    return registry[name].preset if isinstance(name, str) and name in registry else {}


def _of_data(config: TrainConfig, given: Mapping[str, Any]) -> str:
    """Why settings of the data cannot go together, which no row of one setting can say; empty if all is well."""
    if "loss_on" in given and not config.completion_only_loss:
        return f"loss_on={config.loss_on} cannot go with completion_only_loss=false: leave one of them out"
    if not isinstance(config.data, str):
        for name in ("dataset_split", "dataset_config"):
            if name in given:
                return f"{name} has no effect if data is a list: give each data set its own split and config"
        if config.task != "sft":
            return f"task={config.task} takes one data set: put all rows into one file or folder"
        if config.eval_rows and not config.eval_data:
            return "eval_rows cannot hold rows out of several data sets: give eval_data=<file>"
    if isinstance(config.eval_rows, float) and config.eval_rows >= 1:
        return f"eval_rows={config.eval_rows}: give a number of rows, or a share below 1"
    return ""


def _in_words(error: ValidationError) -> str:
    first = error.errors()[0]
    if isinstance(cause := first.get("ctx", {}).get("error"), UserError):
        return str(cause)
    name = str(first["loc"][0]) if first["loc"] else "the configuration"
    if first["type"] == "missing":
        return f"{name} is missing: give --{name} or '{name}:' in the config file"
    return f"{name}={shown(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _refuse_unusable(name: str, value: Any, depth: int = 0) -> None:
    """Refuse what has the right type, and yet no run could use or write down."""
    if isinstance(value, dict | list) and depth < 4:
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            _refuse_unusable(name, inner, depth + 1)
    elif isinstance(value, str):
        if any(unicodedata.category(letter) in UNPRINTED for letter in value):
            raise UserError(f"{name}={shown(value)} holds a character that cannot be printed: remove it")
        if re.search(r"://[^/\s]*@", value):
            raise UserError(
                f"{name} holds a user name or password, and a run writes its settings into its folder: give a local path "
                "or a hub name, and log in to the hub first"
            )
    elif value is not None and not (isinstance(value, int | float) and -(2**63) <= value < 2**63):
        raise UserError(
            f"{name}={shown(value)}: input should be a finite number, a word, true or false, or a short list of these"
        )
