"""How far a run has come, apart from its weights and its optimizer state."""

from __future__ import annotations

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


class Progress(BaseModel):
    """How far a run has come, apart from its weights and its optimizer state; checkpoints hold it as ``standing``.

    Args:
        step: Optimizer steps that are done.
        position: Where the data goes on.
        tokens: Tokens that were trained on.
        train_seconds: Time until the last checkpoint, over all processes that took part one after the other.
        eval_before: Held-out losses before the first step, by name.
        eval_after: The newest held-out losses, by name.
        skipped_steps: Steps that were left out because they were bad.
        skipped_in_a_row: Those among them that came last, one after the other.
        peak_bytes: Largest memory until the last checkpoint.
        trained_steps: Updates of each part, for a run with ``norm_steps``.
        drawn: Tokens drawn from each data set, by its number.
    """

    model_config = ConfigDict(extra="forbid")

    step: Count = 0
    position: Annotated[Position, AfterValidator(_check_position)] = Position()
    tokens: Count = 0
    train_seconds: float = 0.0
    eval_before: dict[str, float] = {}
    eval_after: dict[str, float] = {}
    skipped_steps: Count = 0
    skipped_in_a_row: Count = 0
    peak_bytes: Count = 0
    trained_steps: dict[str, Count] = {}
    drawn: dict[str, Count] = {}

    def advance(self, batch: Batch, position: Position, *, bad: bool) -> None:
        """Count a step with ``batch``, after which the data goes on at ``position``."""
        self.step += 1
        self.position = position
        self.tokens += batch.num_tokens
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
