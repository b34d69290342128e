"""A reward model: a score head in place of the language model's, trained on pairs of answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from lisatune.tasks import PAIRS
from lisatune.tasks.base import Answer, Task, meta_ids, without_adapters


@dataclass(kw_only=True)
class Reward(Task):
    """Gives the chosen answer a higher score than the rejected one (Bradley and Terry). The head trains in every step."""

    trainer: ClassVar[str] = "trl:RewardTrainer"
    arguments: ClassVar[str] = "RewardConfig"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    model_options: ClassVar[dict[str, Any]] = {"num_labels": 1}
    writes_text: ClassVar[bool] = False

    def answers(self, row: Mapping[str, Any]) -> list[Answer]:
        """TRL keeps each conversation whole: the answers begin where they differ."""
        ids = {name: list(row[f"{name}_ids"]) for name in PAIRS}
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(*ids.values(), strict=False))
        num_alike = sum(1 for _ in alike)
        return [Answer(name, tokens, num_alike) for name, tokens in ids.items()]

    def why_left_out(self, answers: Sequence[Answer], max_length: int) -> str:
        """An answer that was cut would have no end to score."""
        return "longer than max_length" if any(len(answer.ids) > max_length for answer in answers) else ""

    def step_loss(self, model: Any, reference: Any, rows: int, tokens: int) -> Tensor:
        """Both answers of a row go through the model together; of each only the last token is scored."""
        inner = without_adapters(model)
        hidden = inner.base_model(input_ids=meta_ids(2 * rows, tokens), use_cache=False).last_hidden_state
        head = next(module for module in inner.children() if module is not inner.base_model)
        chosen, rejected = head(hidden)[:, -1, 0].chunk(2)
        return -logsigmoid(chosen - rejected).mean()
