"""What a run leaves behind after its last step: the trained model with its card, the summary, the report."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

from rich.console import Console

from lisatune import __version__
from lisatune.common.console import tell
from lisatune.common.files import write_whole
from lisatune.common.loss_names import named_losses
from lisatune.errors import NEEDS_MATPLOTLIB
from lisatune.memory.measure import state_bytes
from lisatune.models.card import model_card
from lisatune.models.names import model_of
from lisatune.processes.collectives import barrier, rank
from lisatune.run.build import Run
from lisatune.run.progress import Evaluation, Progress
from lisatune.run.snapshot import environment
from lisatune.run.trained_model import save_trained


def finish(run: Run, progress: Progress, evaluation: Evaluation, console: Console) -> dict[str, Any]:
    """Save the trained model, then its card, the summary and the report; ``evaluation`` is that of the trained model.

    Returns: The summary, as ``summary.json`` holds it.
    """
    summary = summarize(run, progress, evaluation)
    if run.data.streamed:
        console.print(f"train: {run.data.counts[0].describe()}", markup=False, highlight=False, soft_wrap=True)
    if shares := data_shares(run, progress):
        drawn = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        console.print(f"tokens drawn: {drawn}", markup=False, highlight=False, soft_wrap=True)
    save_trained(run, run.folder)
    if rank() == 0:
        write_whole(Path(model_of(str(run.folder))) / "README.md", card_of(run, summary))
        write_whole(run.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        report_if_possible(run.folder, console)
    barrier()
    return summary


def summarize(run: Run, progress: Progress, evaluation: Evaluation) -> dict[str, Any]:
    """The numbers of the whole run."""
    summary: dict[str, Any] = {
        "method": run.config.method, "steps": progress.step, "tokens": progress.tokens,
        **{f"{name}_before": loss for name, loss in named_losses(progress.eval_before).items()},
        **{f"{name}_after": loss for name, loss in named_losses(progress.eval_after).items()},
        "train_seconds": progress.train_seconds, "planned_peak_bytes": run.plan.peak_bytes,
        "peak_bytes": progress.peak_bytes, "base_bytes": run.meter.base_bytes,
        "state_bytes": state_bytes(run.learner.optimizer), "skipped_steps": progress.skipped_steps,
        "padding_share": progress.padding / max(1, progress.computed),
    }  # fmt: skip
    if progress.tensor_peak_bytes:
        summary["tensor_peak_bytes"] = progress.tensor_peak_bytes
    if shares := data_shares(run, progress):
        summary["data_shares"] = shares
    if progress.step < run.data.num_steps:
        summary["planned_steps"] = run.data.num_steps
    if run.config.keep_best and progress.best:
        summary["best_step"] = progress.best.step
    return summary | ({"scores": evaluation.scores} if evaluation.scores else {})


def data_shares(run: Run, progress: Progress) -> dict[str, float]:
    """The share of the tokens that was really drawn from each data set; empty if there is one alone."""
    if len(run.data.names) == 1:
        return {}
    total = max(1, sum(progress.drawn.values()))
    named = [name if run.data.names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(run.data.names)]
    return {name: progress.drawn.get(str(i), 0) / total for i, name in enumerate(named)}


def card_of(run: Run, summary: dict[str, Any]) -> str:
    """The model card of the run."""
    names, counts = run.data.names, run.data.counts
    sizes = [f"{c.used:,} rows, {c.tokens:,} tokens, {c.labelled_tokens:,} of them learned" for c in counts]
    if len(counts) < len(names):  # a stream of several data sets is counted as one
        names, sizes = [*names, "all of them"], [*("" for _ in names), *sizes]
    versions = {"lisatune": __version__, "Python": platform.python_version(), **environment(run.device)}
    return model_card(
        run.config, summary, data=list(zip(names, sizes, strict=True)), versions=versions,
        scores_before=scores_before(run.folder),
    )  # fmt: skip


def scores_before(folder: Path) -> dict[str, float]:
    """Scores on tasks before the first step, which the first line of the metrics holds; empty if there are none."""
    with (folder / "metrics.jsonl").open(encoding="utf-8") as file:
        try:
            return dict(json.loads(file.readline()).get("scores", {}))
        except ValueError:  # somebody has changed the file
            return {}


def report_if_possible(folder: Path, console: Console) -> None:
    """Write the report, or say what it needs."""
    try:
        from lisatune.run.report import write_report
    except ImportError:
        tell(console, f"no report.html, which {NEEDS_MATPLOTLIB}, then lisatune report RUN")
        return
    write_report(folder)
