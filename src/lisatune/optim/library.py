"""SGD, Adafactor and Muon of PyTorch, made fit for layers that come and go."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lisatune.optim.layerwise import BLOCK
from lisatune.optim.rounded import RoundedOptimizer

# Adafactor's epsilon_1, whose square bounds the second moment from below; the paper bounds that by 1e-30. torch's default,
# the epsilon of float32, is as large as gradients often are, and shortens their update; and 1e-30 has a square that float32
# rounds to 0, whose root makes NaN of a row without a gradient, as unseen tokens have.
ADAFACTOR_EPS = (1e-18, 1e-3)


def make_sgd(groups: list[dict[str, Any]], lr: float, momentum: float | None = None, seed: int = 0) -> LibraryOptimizer:
    """``torch.optim.SGD``, with a momentum of 0.9 if none is given."""
    # not fused: torch's fused SGD fails when some parameters have momentum already and others do not
    usual = 0.9 if momentum is None else momentum
    return LibraryOptimizer(torch.optim.SGD(groups, lr=lr, momentum=usual, foreach=False), seed=seed)


def make_adafactor(groups: list[dict[str, Any]], lr: float, seed: int = 0) -> LibraryOptimizer:
    """``torch.optim.Adafactor``."""
    on_meta = any(p.is_meta for group in groups for p in group["params"])
    adafactor = MetaAdafactor if on_meta else torch.optim.Adafactor
    return LibraryOptimizer(adafactor(groups, lr=lr, eps=ADAFACTOR_EPS, foreach=False), seed=seed)


def make_muon(
    groups: list[dict[str, Any]], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
    momentum: float | None = None, vocabulary: Collection[Tensor] = (), seed: int = 0,
) -> LibraryOptimizer:  # fmt: skip
    """``torch.optim.Muon`` for hidden matrices, with a momentum of 0.95 if none is given, and AdamW for the rest."""
    no_matrix = {id(p) for p in vocabulary}
    hidden, rest = _split(groups, lambda p: p.ndim == 2 and id(p) not in no_matrix)
    inner: list[torch.optim.Optimizer] = []
    if hidden:
        usual = 0.95 if momentum is None else momentum
        inner.append(torch.optim.Muon(hidden, lr=lr, momentum=usual, adjust_lr_fn="match_rms_adamw"))
    if rest:
        inner.append(torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps, foreach=False))
    return LibraryOptimizer(*inner, seed=seed)


def _split(
    groups: list[dict[str, Any]], is_hidden: Callable[[Tensor], bool]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """``groups`` with the parameters of which ``is_hidden``, and with the others; groups that come out empty are left out."""
    both = (
        [{**g, "params": [p for p in g["params"] if is_hidden(p) == wanted]} for g in groups]
        for wanted in (True, False)
    )
    hidden, rest = ([group for group in part if group["params"]] for part in both)
    return hidden, rest


class LibraryOptimizer(RoundedOptimizer):
    """Optimizers of a library as one, with groups and state in one place; of bfloat16 weights they see float32 copies.

    The library's ``step`` runs on the groups of each, and on a parameter at a time where weights are bfloat16: then its
    state is float32, and what it makes of the weight is rounded at random.

    Args:
        inner: Optimizers over different parameters, which find whatever they keep in their groups and in ``state``.
        seed: Seed of the stochastic rounding.
    """

    def __init__(self, *inner: torch.optim.Optimizer, seed: int = 0) -> None:
        self._inner = inner
        groups = [
            group | {"inner": number} for number, optimizer in enumerate(inner) for group in optimizer.param_groups
        ]
        super().__init__(groups, {}, seed)

    def update_group(self, group: dict[str, Any]) -> None:
        """Call the library's step for the parameters that have a gradient."""
        inner = self._inner[group["inner"]]
        trained = [p for p in group["params"] if p.grad is not None]
        inner.state = self.state
        inner.param_groups = [{**group, "params": [p for p in trained if p.dtype != torch.bfloat16]}]
        inner.step()
        for p in trained:
            if p.dtype == torch.bfloat16:
                with self._in_float32(p, group["num_steps"]):
                    inner.param_groups = [{**group, "params": [p]}]
                    inner.step()

    @contextmanager
    def _in_float32(self, p: Tensor, num_steps: int) -> Iterator[None]:
        weights, grad = p.data, p.grad
        assert grad is not None
        p.grad, p.data = None, weights.float()
        p.grad = grad.float()
        try:
            yield
        finally:
            new = p.data
            p.grad, p.data = None, weights
            p.grad = grad
        for start in range(0, p.numel(), BLOCK):
            self.write(p, start, new.view(-1)[start : start + BLOCK], num_steps)


class MetaAdafactor(torch.optim.Adafactor):
    """What PyTorch's Adafactor holds, for a forecast: it reads norms, which do not exist on the meta device."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the state of whatever has a gradient, and the temporary of its size."""
        for group in self.param_groups:
            lists: list[list[Any]] = [[] for _ in range(6)]
            self._init_group(group, *lists)
            for p in group["params"]:
                torch.empty_like(p)
