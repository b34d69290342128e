"""How far a run has come, apart from its weights and its optimizer state."""

from __future__ import annotations

import math
import statistics
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from lisatune.data.loader import Batch, Position

Count = Annotated[int, Field(ge=0, lt=2**63)]


def _check_position(position: Position) -> Position:
    if not all(0 <= count < 2**63 for count in position):
        raise ValueError("input should be counts")
    return position


class Evaluation(NamedTuple):
    """What was evaluated between two steps.

    Args:
        losses: Held-out losses by name; None if they were not due.
        scores: Scores on ``eval_tasks`` by name; None if they were not due or there are no such tasks.
    """

    losses: dict[str, float] | None = None
    scores: dict[str, float] | None = None

    def goodness(self, *, by_scores: bool) -> float | None:
        """The mean score, or minus the loss of the first held-out set; None if that was not evaluated.

        Example:
            >>> Evaluation({"math": 2.0, "general": 1.0}).goodness(by_scores=False)
            -2.0
        """
        if by_scores:
            return statistics.fmean(self.scores.values()) if self.scores else None
        return -next(iter(self.losses.values())) if self.losses else None


class Best(BaseModel):
    """The best evaluation so far, and after how many steps it was made."""

    model_config = ConfigDict(extra="forbid")

    step: Count
    goodness: float
    losses: dict[str, float] | None
    scores: dict[str, float] | None


class Progress(BaseModel):
    """How far a run has come, apart from its weights and its optimizer state; checkpoints hold it as ``standing``.

    Args:
        step: Optimizer steps that are done.
        position: Where the data goes on.
        tokens: Tokens that were trained on.
        computed: Places of all batches that were computed.
        padding: Those among them that held no token.
        train_seconds: Time until the last checkpoint, over all processes that took part one after the other.
        eval_before: Held-out losses before the first step, by name.
        eval_after: The newest held-out losses, by name.
        skipped_steps: Steps that were left out because they were bad.
        skipped_in_a_row: Those among them that came last, one after the other.
        peak_bytes: Largest memory until the last checkpoint.
        tensor_peak_bytes: The same of tensors alone, where they were counted.
        trained_steps: Updates of each part, for a run with ``norm_steps``.
        drawn: Tokens drawn from each data set, by its number.
        best: The best evaluation after the first step.
        since_best: Evaluations since then, none of which was better.
    """

    model_config = ConfigDict(extra="forbid")

    step: Count = 0
    position: Annotated[Position, AfterValidator(_check_position)] = Position()
    tokens: Count = 0
    computed: Count = 0
    padding: Count = 0
    train_seconds: float = 0.0
    eval_before: dict[str, float] = {}
    eval_after: dict[str, float] = {}
    skipped_steps: Count = 0
    skipped_in_a_row: Count = 0
    peak_bytes: Count = 0
    tensor_peak_bytes: Count = 0
    trained_steps: dict[str, Count] = {}
    drawn: dict[str, Count] = {}
    best: Best | None = None
    since_best: Count = 0

    def advance(self, batch: Batch, position: Position, *, bad: bool) -> None:
        """Count a step with ``batch``, after which the data goes on at ``position``."""
        self.step += 1
        self.position = position
        self.tokens += batch.num_tokens
        self.computed += batch.computed
        self.padding += batch.padding
        for source, tokens in batch.sources:
            self.drawn[str(source)] = self.drawn.get(str(source), 0) + tokens
        self.skipped_steps += bad
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if bad else 0

    def note(self, evaluation: Evaluation) -> None:
        """Keep the held-out losses, if they were computed."""
        if evaluation.losses is None:
            return
        self.eval_after = evaluation.losses
        if self.step == 0:
            self.eval_before = evaluation.losses

    def is_best(self, evaluation: Evaluation, *, by_scores: bool) -> bool:
        """Whether this evaluation is better than all before it. It is counted, or kept if it is the best.

        The model before the first step is not among them. NaN is never the best.
        """
        goodness = evaluation.goodness(by_scores=by_scores)
        if goodness is None or self.step == 0:
            return False
        better = not math.isnan(goodness) and (self.best is None or goodness > self.best.goodness)
        self.since_best = 0 if better else self.since_best + 1
        if better:
            self.best = Best(step=self.step, goodness=goodness, **evaluation._asdict())
        return better

    def forget_best(self) -> None:
        """Look for the best from here on."""
        self.best, self.since_best = None, 0
