"""What a run of TRL's trainer leaves behind: the trained model with its card, the summary, the report."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from lisatune import __version__
from lisatune.common.files import replace_folder, write_whole
from lisatune.common.loss_names import named_losses
from lisatune.memory.measure import state_bytes
from lisatune.models.card import model_card
from lisatune.models.load import save_model
from lisatune.models.names import model_of
from lisatune.preferences.build import TaskRun
from lisatune.preferences.journal import Standing
from lisatune.processes.collectives import barrier, rank
from lisatune.run.finish import report_if_possible
from lisatune.run.snapshot import environment


def finish(run: TaskRun, standing: Standing, console: Console) -> dict[str, Any]:
    """Save the trained model, then its card, the summary and the report; rank 0 does so, while the others wait.

    Returns: The summary, as ``summary.json`` holds it.
    """
    config, folder = run.config, run.folder
    summary: dict[str, Any] = {
        "task": config.task, "method": config.method, "steps": run.num_steps, "tokens": standing.tokens,
        **{f"{name}_before": loss for name, loss in named_losses(standing.eval_before).items()},
        **{f"{name}_after": loss for name, loss in named_losses(standing.eval_after).items()},
        "train_seconds": standing.train_seconds, "planned_peak_bytes": run.plan.peak_bytes,
        "peak_bytes": standing.peak_bytes, "base_bytes": run.meter.base_bytes,
        "state_bytes": state_bytes(run.trainer.optimizer), "skipped_steps": 0,
    }  # fmt: skip
    if standing.tensor_peak_bytes:
        summary["tensor_peak_bytes"] = standing.tensor_peak_bytes
    if rank() > 0:
        barrier()
        return summary
    save_trained(run)
    versions = {"lisatune": __version__, "Python": platform.python_version(), **environment(run.device)}
    card = model_card(
        config, summary, data=[(str(config.data), f"{run.num_rows:,} rows")], versions=versions, scores_before={}
    )
    write_whole(Path(model_of(str(folder))) / "README.md", card)
    write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    report_if_possible(folder, console)
    barrier()
    return summary


def save_trained(run: TaskRun) -> None:
    """Write ``model``, and ``adapter`` for LoRA; each is there whole or not at all."""
    model, folder = run.trainer.model, run.folder
    run.tokenizer.chat_template = run.template
    if run.config.method == "lora":
        new = folder / ".adapter.new"
        shutil.rmtree(new, ignore_errors=True)  # left by a run that was killed here
        model.save_pretrained(new)
        if not run.config.save_merged:
            run.tokenizer.save_pretrained(new)
        replace_folder(new, folder / "adapter")
        if not run.config.save_merged:
            return
        model = model.merge_and_unload()
    model.requires_grad_(True)
    new = folder / ".model.new"
    shutil.rmtree(new, ignore_errors=True)
    save_model(model, run.tokenizer, new)
    replace_folder(new, folder / "model")
