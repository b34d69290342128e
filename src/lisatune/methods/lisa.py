"""LISA: a few decoder layers train at a time, others in the next interval (arXiv:2403.17919)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lisatune.data.loader import Batch
from lisatune.engine import LisaEngine, StatePolicy
from lisatune.layers import Layers, Trains
from lisatune.methods.base import Method
from lisatune.pieces import split_layers
from lisatune.samplers import make_sampler
from lisatune.samplers.base import Sampler
from lisatune.samplers.draws import check_num_active
from lisatune.slices.engine import SliceEngine

if TYPE_CHECKING:
    from lisatune.learner import Learner


@dataclass(kw_only=True)
class Lisa(Method):
    """Trains the parts that a sampler draws. ``LisaEngine`` is the whole of it; the arguments are settings.

    ``fixed`` and ``badam`` are this method with another sampler, see ``METHODS``.
    """

    sampler: str
    sampler_options: dict[str, Any]
    sampled_unit: Literal["layers", "halves", "modules", "slices"]
    num_active: int
    interval_steps: int
    seed: int
    state_policy: StatePolicy
    train_embedding: Trains
    train_head: Trains
    task: str = "sft"
    engine: LisaEngine | SliceEngine = field(init=False, repr=False)
    _scores: dict[int, float] = field(init=False, default_factory=dict, repr=False)

    def prepare(self, model: Any) -> tuple[Any, Layers]:
        """Parts are whole decoder layers, or pieces of them if ``sampled_unit`` says so. Slices are no parts."""
        model, layers = super().prepare(model)
        if self.sampled_unit == "layers" or self.sampled_unit == "slices":
            return model, layers
        return model, split_layers(layers, self.sampled_unit)

    def start(self, layers: Layers, *, linear_head: bool) -> None:
        """Make the engine, which freezes nothing before the first step."""
        super().start(layers, linear_head=linear_head)
        self.engine = self.make_engine(layers)

    def make_engine(self, layers: Layers) -> LisaEngine | SliceEngine:
        """The engine for ``layers``.

        Raises: UserError for options that the sampler does not know.
        """
        sampler = self._sampler(layers)
        return LisaEngine(
            layers, sampler, self.interval_steps, self.state_policy, train_embedding=self.train_embedding,
            train_head=self.train_head,
        )  # fmt: skip

    def _sampler(self, layers: Layers) -> Sampler:
        pool = layers.pool(train_embedding=self.train_embedding, train_head=self.train_head)
        return make_sampler(
            self.sampler, num_layers=len(pool), num_active=self.num_active, interval_steps=self.interval_steps,
            seed=self.seed, names=pool, **self.sampler_options,
        )  # fmt: skip

    def largest_draws(self, model: Any) -> list[tuple[int, ...]]:
        """The draws of the sampler. If the embedding is frozen, the backward pass ends early in some.

        A score head holds no logits, so there the lowest layer can need more than the top ones.
        """
        _, layers = self.prepare(model)
        pool, counts = (
            layers.pool(train_embedding=self.train_embedding, train_head=self.train_head),
            layers.num_parameters(),
        )
        unit = "decoder layers" if self.sampled_unit == "layers" else self.sampled_unit
        check_num_active(self.num_active, len(pool), unit=unit, least=0)
        ends_early = self.train_embedding is not True or self.task == "reward"
        sizes = [counts[part] for part in pool]
        return self._sampler(layers).largest_draws(sizes, len(layers.decoder) if ends_early else None)

    def draw_always(self, drawn: tuple[int, ...]) -> None:
        """Put a sampler that knows one draw in place of the engine's."""
        self.engine.sampler = OneDraw(len(self.engine.pool), drawn)

    def begin_step(self, number: int, optimizer: torch.optim.Optimizer) -> bool:
        """Freeze and thaw at the beginning of an interval."""
        return self.engine.begin_step(number, optimizer)

    def gradients(self, learner: Learner, micro_batches: Iterable[Batch], num_labelled: int) -> tuple[Tensor, Tensor]:
        """The same as for any method. A sampler that learns sees the gradients before they are clipped."""
        loss = learner.backward(micro_batches, num_labelled)
        self._scores = self.engine.scores()
        return loss, learner.clip()

    def observe(self, number: int, bad: bool) -> None:
        """Tell a sampler that learns about a step that was made."""
        if not bad:
            self.engine.observe(number, self._scores)

    def trained_parts(self) -> set[str]:
        """What was drawn, and what trains always; nothing before the first step."""
        return set() if self.engine.drawn is None else self.engine.trained_parts(self.engine.drawn)


@dataclass(frozen=True)
class OneDraw(Sampler):
    """The same draw in each interval."""

    num_layers: int
    drawn: tuple[int, ...]

    def __call__(self, interval: int) -> tuple[int, ...]:
        return self.drawn

    def inclusion(self, interval: int) -> tuple[float, ...]:
        return (0.5,) * self.num_layers  # any below 1, for which a correction needs its memory
