"""Settings in files and words: YAML, read with care, and key=value."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from lisatune.common.files import write_whole
from lisatune.errors import UserError
from lisatune.settings.config import TrainConfig
from lisatune.settings.rules import used_settings


def read_settings(path: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """The settings of a YAML file, then those of ``key=value`` words, which win.

    Example:
        >>> read_settings(None, ["learning_rate=5e-4", "packing=true"])
        {'learning_rate': 0.0005, 'packing': True}
    """
    settings: dict[str, Any] = {}
    if path is not None:
        settings |= _read_yaml(Path(path))
    for word in overrides:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise UserError(f"'{word}' is not of the form key=value, for example learning_rate=5e-4")
        settings[name.strip()] = _value(value)
    return settings


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # not there, not text, or no name that a file can have
        raise UserError(f"config file {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return parse_settings(text, str(path))


def parse_settings(text: str, name: str) -> dict[str, Any]:
    """The settings that ``text``, the content of the file ``name``, holds.

    Raises: UserError if they are not YAML's ``name: value`` lines.
    """
    try:
        loaded = _load_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise UserError(
            f"config file {name}{place}: not valid YAML ({getattr(error, 'problem', None) or error}); fix it"
        ) from error
    if not isinstance(loaded, dict):
        raise UserError(f"config file {name} must hold 'name: value' lines")
    return loaded


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, for names that stand once: PyYAML would let the last one win in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        names = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag == "tag:yaml.org,2002:merge":
                # merges of merges can fill the memory from a few lines, and a list of settings has no use for them
                raise yaml.constructor.ConstructorError(None, None, "<< is not for settings", key.start_mark)
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is given twice", key.start_mark)
            names.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def _load_yaml(text: str) -> Any:
    """What ``yaml.safe_load`` gives; raises nothing but ``yaml.YAMLError``."""
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except RecursionError as error:
        raise yaml.YAMLError("nested too deep") from error
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        # PyYAML's own, for a value that is not what its form or its tag says, such as the date 2024-99-99
        raise yaml.YAMLError(f"a value is not what its form says, {error}") from error


def _value(text: str) -> Any:
    """YAML's reading of ``text``, and numbers such as 5e-4, which YAML 1.1 takes for words."""
    try:
        value = _load_yaml(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str) and value == text:  # quotes say that it is no number
        try:
            return float(value)
        except ValueError:
            return text
    return value


def write_config(config: TrainConfig, path: Path) -> None:
    """Write ``used_settings``, so that ``lisatune train --config`` repeats the run."""
    write_whole(path, yaml.safe_dump(used_settings(config), sort_keys=False, allow_unicode=True))
