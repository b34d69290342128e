"""What becomes of a run after a step whose loss or gradient was bad."""

from __future__ import annotations

from rich.console import Console

from lisatune.common.console import warn
from lisatune.common.run_folder import how_to_resume
from lisatune.data.loader import Batch
from lisatune.errors import UserError
from lisatune.learner import Outcome
from lisatune.processes.collectives import together
from lisatune.run.build import Run
from lisatune.run.progress import Progress

MOST_SKIPPED_IN_A_ROW = 10


def skip_or_stop(run: Run, progress: Progress, batch: Batch, outcome: Outcome, console: Console) -> None:
    """Report a step that was left out.

    Raises: UserError if ``on_bad_step`` says to stop, or if too many steps in a row were left out.
    """
    config = run.config
    shown = "; ".join(batch.places[:3]) + (f" and {len(batch.places) - 3} more" if len(batch.places) > 3 else "")
    limit = f" (bad_grad_norm={config.bad_grad_norm})" if config.bad_grad_norm else ""
    text = (
        f"step {progress.step}: the loss is {outcome.loss.item():.6g} and the gradient norm {outcome.grad_norm.item():.6g}{limit} "
        f"with the rows {shown}"
    )
    if config.on_bad_step == "skip" and progress.skipped_in_a_row < MOST_SKIPPED_IN_A_ROW:
        warn(console, f"{text}: left out")
        return
    again = f" for the {MOST_SKIPPED_IN_A_ROW}th time in a row" if config.on_bad_step == "skip" else ""
    with together():
        raise UserError(
            f"{text}{again}, so the run was stopped; its last checkpoint is unchanged; lower learning_rate, raise "
            f"warmup_steps, or set on_bad_step=skip; {how_to_resume(run.folder)} --allow-changes, and add the "
            "settings that you change"
        )
