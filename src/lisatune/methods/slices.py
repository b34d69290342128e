"""LISA by slices: a block of rows or columns of every matrix trains at a time, instead of whole decoder layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lisatune.layers import Layers, Trains
from lisatune.memory.blocks import SliceOf
from lisatune.methods.base import State
from lisatune.methods.full import rate_of_width
from lisatune.methods.lisa import Lisa
from lisatune.optim import OPTIMS
from lisatune.samplers import make_sampler
from lisatune.samplers.draws import check_num_active
from lisatune.slices.engine import SliceEngine, usual_num_slices

SPECTRAL_RATIO = 4 / 3  # three models learned best at one to two times the rate that is best for the sign


@dataclass(kw_only=True)
class Slices(Lisa):
    """``Lisa`` with another engine, for ``sampled_unit=slices``. ``SliceEngine`` is the whole of it."""

    num_slices: int | None
    train_norms: Trains
    slices_of: SliceOf
    optim: str
    engine: SliceEngine = field(init=False, repr=False)

    def usual_learning_rate(self, layers: Layers) -> float:
        """That of all weights, times ``num_slices / num_active``: a slice trains in so few of the steps."""
        ratio = SPECTRAL_RATIO if OPTIMS[self.optim].spectral else 1.0
        return ratio * rate_of_width(layers) * self.num_slices_of(layers) / self.num_active

    def num_slices_of(self, layers: Layers) -> int:
        """Blocks of each matrix."""
        return self.num_slices or usual_num_slices(len(layers.decoder))

    def make_engine(self, layers: Layers) -> SliceEngine:
        """The engine for ``layers``, each of whose matrices has ``num_slices`` blocks to draw from."""
        num_slices = self.num_slices_of(layers)
        check_num_active(self.num_active, num_slices, unit="slices")
        sampler = make_sampler(
            self.sampler, num_layers=num_slices, num_active=self.num_active, interval_steps=self.interval_steps,
            seed=self.seed, **self.sampler_options,
        )  # fmt: skip
        return SliceEngine(
            layers, sampler, self.interval_steps, self.state_policy, train_embedding=self.train_embedding,
            train_head=self.train_head, train_norms=self.train_norms, slices_of=self.slices_of,
        )  # fmt: skip

    def largest_draws(self, model: Any) -> list[tuple[int, ...]]:
        """One will do: ``draw_always`` takes the largest slices."""
        return [()]

    def draw_always(self, drawn: tuple[int, ...]) -> None:
        """Draw as many slices as are ever drawn at a time. A sweep whose slices do not divide evenly has smaller draws."""
        self.engine.draw_most()

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Replace the whole matrices in ``optimizer`` by their slices."""
        self.engine.adopt(optimizer)

    def states(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> dict[str, tuple[Tensor, State]]:
        """Optimizer state is that of slices, which are called ``NAME[BLOCK]``."""
        return self.engine.states(parameters, optimizer)

    def place_state(
        self, name: str, parameters: Mapping[str, nn.Parameter], saved: State,
        place: Callable[[nn.Parameter, State], None],
    ) -> None:  # fmt: skip
        """Put back the state of a parameter that is not cut, of all slices of one, or of the slice ``NAME[BLOCK]``."""
        if name in parameters and name not in self.engine.cuts:
            place(parameters[name], saved)
        else:
            self.engine.place_state(name, saved, place)
