"""The command that repeats a run."""

from __future__ import annotations

import json
import shlex
from typing import Any

from lisatune.errors import UserError
from lisatune.settings.build import build_config
from lisatune.settings.config import TrainConfig
from lisatune.settings.files import read_settings
from lisatune.settings.rules import used_settings

OPTIONS = ("model", "data", "output")


def train_command(config: TrainConfig) -> str:
    """What to type for a run with these settings: none that is so without being said.

    Cost: the settings are checked once for each of them, about 50 milliseconds.
    Example:
        >>> train_command(build_config({"model": "m", "data": "my rows.jsonl", "output": "o", "learning_rate": 1e-4, "seed": 0}))
        "lisatune train --model m --data 'my rows.jsonl' --output o learning_rate=0.0001"
    """
    settings = {name: value for name, value in used_settings(config).items() if value is not None}
    # twice: whether one is so by itself may depend on others that are left out later
    for name in [name for name in settings if name not in OPTIONS] * 2:
        rest = {other: value for other, value in settings.items() if other != name}
        try:
            needed = build_config(rest) != config
        except UserError:  # another setting would have no effect without it
            needed = True
        settings = settings if needed else rest
    plain = {name: value for name in OPTIONS if isinstance(value := settings[name], str)}
    options = [word for name, value in plain.items() for word in (f"--{name}", value)]
    words = [f"{name}={_spelled(name, value)}" for name, value in settings.items() if name not in plain]
    return shlex.join(["lisatune", "train", *options, *words])


def _spelled(name: str, value: Any) -> str:
    """``value`` as a word that is read as what it is."""
    plain = str(value)
    stays = isinstance(value, str | int | float) and not isinstance(value, bool)
    return plain if stays and read_settings(None, [f"{name}={plain}"])[name] == value else json.dumps(value)
