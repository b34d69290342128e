"""How large the weights of a part are, and how far they are from those that the run began with.

Shapes: a weight or its change is (out, in); LoRA's factors are up, B of the paper, (out, r), and down, A, (r, in).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lisatune.study.matrix_rank import (
    change_singular_values,
    effective_rank,
    product_norm,
    product_singular_values,
    stable_rank,
)
from lisatune.study.start_weights import StartWeights, blocks_of
from lisatune.study.trained_parts import Adapter, TrainedPart


class Distances:
    """Measures parts against the weights that they have now.

    Args:
        model: The model, before the first step.
        parts: Its parts, as ``trained_parts_of`` gives them.
        source: Folder or hub name that the model was loaded from.
    """

    def __init__(self, model: nn.Module, parts: Iterable[TrainedPart], source: str | Path | None) -> None:
        self.start = StartWeights(model, source)
        for part in parts:
            for name, parameter in part.trained().items():
                self.start.add(name, parameter, in_file=name in part.plain)

    def measure(self, part: TrainedPart) -> dict[str, float]:
        """Norms of what trains in ``part`` now, and of how far it is from where it began; see ``NormRecorder``."""
        norms, changes = [], []
        for name, parameter in part.plain.items():
            norm, change = self._norm_and_change(name, parameter)
            norms.append(norm)
            changes.append(change)
        if not part.adapters:
            return {"norm": math.hypot(*norms), "change": math.hypot(*changes)}
        of_factor: dict[str, list[float]] = {"down": [], "up": []}
        moved = list(changes)
        for adapter in part.adapters:
            for factor, (name, parameter) in adapter.factors().items():
                norm, change = self._norm_and_change(name, parameter)
                of_factor[factor].append(norm)
                moved.append(change)
            changes.append(abs(adapter.scale) * product_norm(*self._factors_of_change(adapter)))
        return {
            "norm": math.hypot(*norms, *of_factor["down"], *of_factor["up"]), "change": math.hypot(*changes),
            "a_norm": math.hypot(*of_factor["down"]), "b_norm": math.hypot(*of_factor["up"]),
            "adapter_change": math.hypot(*moved),
        }  # fmt: skip

    def _norm_and_change(self, name: str, parameter: Tensor) -> tuple[float, float]:
        squares = torch.zeros(2, dtype=torch.float64, device=parameter.device)
        for index in blocks_of(parameter.shape):
            now = parameter[index].float()
            then = self.start.block(name, index, parameter)
            norms = torch.stack([torch.linalg.vector_norm(now), torch.linalg.vector_norm(now.sub(then))])
            squares += norms.double().square()
        norm, change = squares.sqrt().tolist()
        return norm, change

    def _factors_of_change(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        """up and down of B A - B_0 A_0: twice as many of them, [B, -B_0] and [A; A_0], unless B_0 A_0 is 0, as peft begins."""
        if adapter.begins_at_zero:
            return adapter.up, adapter.down
        (down_name, down), (up_name, up) = adapter.factors().values()
        return (
            torch.cat([up.float(), -self.start.whole(up_name, up)], dim=1),
            torch.cat([down.float(), self.start.whole(down_name, down)], dim=0),
        )

    def ranks(self, part: TrainedPart, change: float) -> dict[str, Any]:
        """Ranks of the changes of the matrices that moved; none are computed if ``change`` is not finite."""
        matrices: dict[str, dict[str, float]] = {}
        moved = change > 0 and math.isfinite(change)
        for name, singular in self._singular_values(part) if moved else ():
            change = singular.square().sum().sqrt().item()
            if change > 0:
                matrices[name] = {
                    "change": change, "rank": effective_rank(singular), "stable_rank": stable_rank(singular),
                    "of": float(len(singular)),
                }  # fmt: skip
        mean = {key: _mean([values[key] for values in matrices.values()]) for key in ("rank", "stable_rank")}
        return {**mean, "matrices": matrices}

    def _singular_values(self, part: TrainedPart) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in part.plain.items():
            if parameter.ndim >= 2:
                yield name, self._change_singular_values(name, parameter)
        for adapter in part.adapters:
            yield adapter.name, abs(adapter.scale) * product_singular_values(*self._factors_of_change(adapter))

    def _change_singular_values(self, name: str, parameter: Tensor) -> Tensor:
        def changes(*, by_columns: bool) -> Iterator[Tensor]:
            for index in blocks_of(parameter.shape, by_columns=by_columns):
                change = parameter[index].double() - self.start.block(name, index, parameter).double()
                yield change.reshape(-1, change.shape[-1])

        rows, columns = parameter.numel() // parameter.shape[-1], parameter.shape[-1]
        wide = rows < columns and parameter.ndim == 2
        return change_singular_values(
            (change.mT for change in changes(by_columns=True)) if wide else changes(by_columns=False)
        )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
