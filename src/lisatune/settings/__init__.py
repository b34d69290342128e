"""The settings of a run: a row each, in groups; the rules that read the rows; the files that hold them."""

from __future__ import annotations

from lisatune.settings.build import build_config
from lisatune.settings.command import train_command
from lisatune.settings.config import ROWS, TrainConfig
from lisatune.settings.files import parse_settings, read_settings, write_config
from lisatune.settings.methods import LAYERWISE
from lisatune.settings.renamed import with_new_names
from lisatune.settings.rules import check_num_ranks, differences, plays, used_settings

__all__ = [
    "LAYERWISE", "ROWS", "TrainConfig", "build_config", "check_num_ranks", "differences", "parse_settings", "plays",
    "read_settings", "train_command", "used_settings", "with_new_names", "write_config",
]  # fmt: skip
