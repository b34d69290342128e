"""What can be found wrong with a run before torch is imported, so that a mistake is answered at once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from lisatune.common.run_folder import check_output
from lisatune.data.examples import HeldOut, read_examples
from lisatune.data.formats import Example
from lisatune.errors import UserError
from lisatune.evaluation.tasks.check import check_eval_tasks
from lisatune.models.names import check_model_name
from lisatune.processes.launch import number_started
from lisatune.samplers.draws import check_num_active
from lisatune.settings import LAYERWISE, TrainConfig


def check_num_layers(config: TrainConfig) -> None:
    """Refuse more active layers than a local model's config.json says there are; other models are checked when loaded."""
    file = Path(config.model).expanduser() / "config.json"
    if config.method not in LAYERWISE or config.sampled_unit != "layers" or not file.is_file():
        return
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        num_layers = {**settings, **settings.get("text_config", {})}.get("num_hidden_layers")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is not the config.json of a model ({error})") from error
    if isinstance(num_layers, int):
        check_num_active(config.num_active, num_layers)


def preflight(config: TrainConfig, *, resume: bool = False) -> tuple[Iterable[Example], HeldOut]:
    """Every check that needs no torch, then the examples to train on and those held out."""
    # one of several processes holds the folder for all; if each tried, they would take one another for another run
    check_output(Path(config.output), resume=resume, held=number_started() > 0)
    check_model_name(config.model)
    check_num_layers(config)
    check_eval_tasks(config)
    return read_examples(config)
