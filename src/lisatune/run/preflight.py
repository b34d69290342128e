"""What can be found wrong with a run before torch is imported, so that a mistake is answered at once."""

from __future__ import annotations

from pathlib import Path

from lisatune.common.run_folder import check_output
from lisatune.data.examples import HeldOut, Rows, read_examples
from lisatune.evaluation.tasks.check import check_eval_tasks
from lisatune.models.names import check_max_length, check_model_name, check_not_quantised, read_config
from lisatune.processes.launch import number_started
from lisatune.run.trackers import check_trackers
from lisatune.samplers.draws import check_num_active
from lisatune.settings import LAYERWISE, TrainConfig


def check_num_layers(config: TrainConfig) -> None:
    """Refuse more active layers than a local model's config.json says there are; other models are checked when loaded."""
    if (
        config.method not in LAYERWISE
        or config.sampled_unit != "layers"
        or (found := read_config(config.model)) is None
    ):
        return
    num_layers = found[1].get("num_hidden_layers")
    if isinstance(num_layers, int):
        check_num_active(config.num_active, num_layers)


def preflight(config: TrainConfig, *, resume: bool = False) -> tuple[list[Rows], HeldOut]:
    """Every check that needs no torch, then the examples to train on and those held out."""
    # one of several processes holds the folder for all; if each tried, they would take one another for another run
    check_output(Path(config.output), resume=resume, held=number_started() > 0)
    check_model_name(config.model)
    check_num_layers(config)
    if (found := read_config(config.model)) is not None:
        check_not_quantised(config.model, found[1])
    check_max_length(config.model, config.max_length)
    check_eval_tasks(config)
    check_trackers(config)
    return read_examples(config)
