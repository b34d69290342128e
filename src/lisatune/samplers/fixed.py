"""The same layers in every interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from lisatune.errors import UserError
from lisatune.samplers.base import Sampler
from lisatune.samplers.draws import check_counts, shuffled


@dataclass(frozen=True)
class FixedSampler(Sampler):
    """The same layers in every interval; the others never train.

    Args:
        num_layers: Decoder layers of the model (N_L), at least 1.
        layers: Those that train, distinct, in any order. By default ``num_active`` layers, drawn once by ``seed``.
        num_active: How many layers train, used only if there are no ``layers``.
        seed: Seed of that draw, any integer.
    Raises: UserError for a layer that there is not, or that is named twice.
    Reference: The paper's LISA-fix, arXiv:2403.17919v4, with layers drawn once; its ablation's K = T.
    Example:
        >>> FixedSampler(num_layers=32, layers=(31, 30))(interval=7)
        (30, 31)
    """

    num_layers: int
    layers: tuple[int, ...] = None  # type: ignore[assignment]  # None until __post_init__
    num_active: int = field(default=0, compare=False, repr=False)
    seed: int = field(default=0, compare=False, repr=False)
    for_slices: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.layers is None:
            check_counts(self.num_layers, self.num_active)
            drawn = shuffled(self.num_layers, self.seed, 0)[: self.num_active]
        else:
            check_counts(self.num_layers, 0)
            drawn = tuple(self.layers)
        object.__setattr__(self, "layers", tuple(sorted(drawn)))
        object.__setattr__(self, "num_active", len(drawn))
        for layer in self.layers:
            if layer not in range(self.num_layers):
                raise UserError(f"there is no layer {layer} to train: choose 0 to {self.num_layers - 1}")
            if self.layers.count(layer) > 1:
                raise UserError(f"layer {layer} is named twice: name each layer to train once")

    def __call__(self, interval: int) -> tuple[int, ...]:
        """The layers, ascending."""
        return tuple(sorted(self.layers))

    def largest_draws(self, sizes: Sequence[int], num_decoder: int | None = None) -> list[tuple[int, ...]]:
        """The only one."""
        return [self(0)]

    def inclusion(self, interval: int) -> tuple[float, ...]:
        """1 for the layers that train, 0 for the others."""
        return tuple(1.0 if layer in self.layers else 0.0 for layer in range(self.num_layers))
