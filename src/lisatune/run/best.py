"""The trained model, if it is to be the best one and not the last."""

from __future__ import annotations

from rich.console import Console

from lisatune.common.console import warn
from lisatune.errors import UserError
from lisatune.run.build import Run
from lisatune.run.progress import Evaluation, Progress
from lisatune.run.snapshot import Snapshots, State
from lisatune.settings import used_settings

# what an evaluation depends on: with another value it is no match for those before
MEASURED_BY = ("keep_best", "eval_data", "eval_rows", "eval_tasks", "eval_limit")


def settle_on_best(
    run: Run, progress: Progress, snapshots: Snapshots, last: Evaluation, console: Console
) -> Evaluation:
    """Training is over: put the best weights back, if ``keep_best`` says so.

    Returns: What the trained model reached; ``last`` is the evaluation of the last step.
    """
    best = progress.best
    if not run.config.keep_best:
        return run.completed(last)
    if best is None:
        warn(console, "keep_best: no evaluation gave a number, so the trained model is the last one")
        return run.completed(last)
    if best.step != progress.step:
        snapshots.put_back(best.step)
    console.print(f"the trained model is that of step {best.step:,}, the best of all evaluated", highlight=False)
    evaluation = run.completed(Evaluation(best.losses, best.scores))
    progress.note(evaluation)
    return evaluation


def check_best(
    run: Run, progress: Progress, state: State, snapshots: Snapshots, console: Console, *, allow_changes: bool
) -> None:
    """Look whether the best checkpoint so far can be put back when the resumed run ends; forget it if it cannot.

    Raises: UserError if it is not whole, and ``allow_changes`` is false.
    """
    now = used_settings(run.config)
    if any(state.config.get(name) != now.get(name) for name in MEASURED_BY):
        progress.forget_best()
    best = progress.best
    if not run.config.keep_best or best is None or best.step == progress.step:
        return
    if (damage := snapshots.checkpoints.damage(best.step)) is None:
        return
    if not allow_changes:
        raise UserError(
            f"{damage}; it was the best so far: put a copy of it back, or add --allow-changes to look for the best from here on"
        )
    warn(console, f"{damage}; it was the best so far, so the best is looked for from here on")
    progress.forget_best()
