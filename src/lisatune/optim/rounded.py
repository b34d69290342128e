"""What optimizers over bfloat16 weights have in common: state in float32, and weights that are rounded at random."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lisatune.errors import UserError
from lisatune.memory.blocks import put_elements, whole_of
from lisatune.optim.rounding import random_bits, round_stochastically
from lisatune.processes.tensors import first_element


class RoundedOptimizer(torch.optim.Optimizer, ABC):
    """Calls ``update_group`` for each group of parameters, and writes weights so that small updates arrive.

    A bfloat16 weight takes a new value by stochastic rounding: an update below 1/512 of it would be lost otherwise. The
    noise of an element depends on ``seed``, the number of the step, the parameter's place in the optimizer and the
    element's in the parameter alone, so a resumed run draws the same. State keeps its type through ``load_state_dict``,
    where torch would cast it to that of the weights.

    Args:
        params: Parameters or groups.
        defaults: Settings of a group that gives none.
        seed: Seed of the stochastic rounding.
    Raises: UserError for a parameter that is not contiguous.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], seed: int = 0) -> None:
        self.seed = seed
        self.places: dict[Tensor, int] = {}
        super().__init__(params, {**defaults, "num_steps": 0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The same as in ``torch.optim.Optimizer``."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not whole_of(p).is_contiguous():
                raise UserError(f"a parameter of shape {tuple(p.shape)} is not contiguous: make it from .contiguous()")
            self.places[p] = len(self.places)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that takes part, and count the step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.update_group(group)
            group["num_steps"] += 1
        return loss

    @abstractmethod
    def update_group(self, group: dict[str, Any]) -> None:
        """Update the parameters of ``group``."""

    def write(self, p: Tensor, start: int, values: Tensor, num_steps: int) -> None:
        """Put ``values``, float32, shape (n,), into the elements of ``p`` from ``start`` on, in step ``num_steps``."""
        stop, first = start + len(values), first_element(p)
        if p.dtype == torch.bfloat16:
            name = f"weight {self.seed} {num_steps} {self.places[whole_of(p)]}"
            bits = random_bits(name, first + start, first + stop, p.device)
            values = round_stochastically(values, bits.bitwise_and_(0xFFFF))
        put_elements(p, start, values)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The same as in ``torch.optim.Optimizer``, but state is a copy and keeps its type."""
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, p in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                self.state[p] = {
                    name: value.to(p.device if value.ndim else value.device, copy=True)
                    for name, value in state_dict["state"][number].items()
                }
