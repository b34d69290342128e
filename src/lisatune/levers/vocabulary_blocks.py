"""Gradients of embedding and head made a block of rows at a time, never whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lisatune.errors import UserError
from lisatune.levers.base import Lever
from lisatune.optim.adamw import AdamW
from lisatune.optim.row_gradients import watch_embedding

if TYPE_CHECKING:
    from lisatune.learner import Learner


@dataclass(kw_only=True)
class VocabularyBlocks(Lever):
    """Lets embedding and head leave their gradients with the optimizer, which makes and uses a block at a time.

    ``RowGradients`` is the whole of it.
    """

    needs_our_adamw: ClassVar[bool] = True

    def put_on(self, learner: Learner) -> None:
        """Watch the embedding; the loss watches the head.

        Raises: UserError if the logits are more than a product with the head.
        """
        if not learner.linear_head:
            raise UserError(
                f"vocabulary_blocks does not work with {type(learner.layers.model).__name__}, which changes the logits after its "
                "head: leave vocabulary_blocks out"
            )
        assert isinstance(learner.optimizer, AdamW)
        learner.rows = learner.optimizer.row_gradients
        learner.rows.add_up = learner.placement.add_up
        watch_embedding(learner.layers.embedding, learner.rows)
