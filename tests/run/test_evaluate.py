from types import SimpleNamespace

import pytest

from lisatune.data.loader import Position
from lisatune.run.build import Run, is_due
from lisatune.run.progress import Evaluation, Progress


class Evaluated(Run):
    """A run whose evaluations are numbers."""

    def __init__(self, num_steps, **periods):
        self.config = SimpleNamespace(**periods)
        self.data = SimpleNamespace(num_steps=num_steps)

    def held_out_losses(self):
        return {"": 1.0}

    def task_scores(self):
        return {"gsm8k": 0.5}


@pytest.mark.parametrize(
    ("losses_every", "scores_every", "losses_at", "scores_at"),
    [(None, 0, [0, 6], [0, 6]), (2, 0, [0, 2, 4, 6], [0, 6]), (4, 3, [0, 4, 6], [0, 3, 6])],
)
def test_all_is_evaluated_at_both_ends_and_each_at_its_period(losses_every, scores_every, losses_at, scores_at):
    run = Evaluated(6, eval_steps=losses_every, eval_tasks_steps=scores_every)
    found = [run.evaluate(step) for step in range(7)]
    assert [step for step, evaluation in enumerate(found) if evaluation.losses is not None] == losses_at
    assert [step for step, evaluation in enumerate(found) if evaluation.scores is not None] == scores_at


def test_without_a_period_nothing_is_due():
    assert [is_due(period, 6) for period in (None, 0, 4, 3)] == [False, False, False, True]


def test_progress_counts_steps_tokens_and_bad_steps_in_a_row():
    progress, batch = Progress(), SimpleNamespace(num_tokens=5, sources=[("a", 5)], computed=8, padding=3)
    progress.note(Evaluation(losses={"": 2.0}))
    for bad in (True, True, False, True):
        progress.advance(batch, Position(1, 2, 3), bad=bad)
    progress.note(Evaluation())
    assert (progress.step, progress.tokens, progress.position) == (4, 20, Position(1, 2, 3))
    assert progress.drawn == {"a": 20}
    assert (progress.computed, progress.padding) == (32, 12)
    assert (progress.skipped_steps, progress.skipped_in_a_row) == (3, 1)
    assert (progress.eval_before, progress.eval_after) == ({"": 2.0}, {"": 2.0})
    progress.note(Evaluation(losses={"": 1.0}))
    assert (progress.eval_before, progress.eval_after) == ({"": 2.0}, {"": 1.0})
