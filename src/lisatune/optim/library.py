"""SGD, Adafactor and Muon of PyTorch, and our LARS and LAMB, made fit for layers that come and go."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lisatune.errors import UserError
from lisatune.optim.layerwise import BLOCK, Lamb, Lars
from lisatune.optim.rounded import RoundedOptimizer

LibraryName = Literal["sgd", "lars", "lamb", "adafactor", "muon"]

# Adafactor's epsilon_1, whose square bounds the second moment from below; the paper bounds that by 1e-30. torch's default,
# the epsilon of float32, is as large as gradients often are, and shortens their update; and 1e-30 has a square that float32
# rounds to 0, whose root makes NaN of a row without a gradient, as unseen tokens have.
ADAFACTOR_EPS = (1e-18, 1e-3)


def make_library_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float | None = None,
    trust_coefficient: float = 1.0,
    adapt_vectors: bool = False,
    vocabulary: Collection[Tensor] = (),
    seed: int = 0,
) -> torch.optim.Optimizer:
    """The optimizer ``name`` over ``groups``, right while LISA freezes and thaws under it.

    =========  ====================================================  =====================  ==============================
    name       step                                                  state, bytes/element   also reads
    =========  ====================================================  =====================  ==============================
    sgd        ``torch.optim.SGD``; weight decay joins the gradient  4 (0: no momentum)     momentum (0.9)
    lars       ``layerwise.Lars``; weight decay joins the gradient   4 (0: no momentum)     momentum (0.9),
                                                                                            trust_coefficient,
                                                                                            adapt_vectors
    lamb       ``layerwise.Lamb``                                    8                      betas, eps, adapt_vectors
    adafactor  ``torch.optim.Adafactor``; decoupled weight decay     a row and a column of
                                                                     a matrix; 4 of a vector
    muon       ``torch.optim.Muon`` of hidden matrices, at AdamW's   4                      momentum (0.95)
               learning rate (``match_rms_adamw``);
               ``torch.optim.AdamW`` of the rest                     8                      betas, eps
    =========  ====================================================  =====================  ==============================

    All of them: what has no gradient is left alone (no weight decay, no momentum, no state); a state that was dropped
    begins afresh, its own steps counted; and state is float32, whatever the weights are. bfloat16 weights are rounded at
    random, so that small updates arrive: torch's own would round to nearest, and lose nearly all of them.

    Learning rates mean different things. Of adafactor and lars it is a share of the parameter's size (adafactor: at most
    1 / sqrt(t) of its root mean square, at least of 1e-3); of lamb, of its norm; of muon, a root mean square of 0.2 for
    each element of a matrix; of sgd, the gradient's unit.

    Args:
        name: One of the table.
        groups: As ``torch.optim.Optimizer`` takes them, each with its ``weight_decay``.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        momentum: None: as in the table.
        trust_coefficient: The paper's eta, see ``Lars``.
        adapt_vectors: Scale the steps of vectors (norms and biases) by their norms too.
        vocabulary: Parameters of embeddings and head, which are no hidden matrices. Nor are vectors, and what has three
            dimensions, as stacked experts have.
        seed: Of the rounding of bfloat16 weights.
    Returns: One optimizer over all groups; muon's come apart in two each.
    Raises: UserError for another name.
    Cost: torch's need one to three temporaries of the largest parameter; with bfloat16 weights, its weights and gradient
        in float32 besides, and one call of the library for each parameter. lars and lamb work on blocks.
    Reference: Shazeer and Stern, Adafactor, arXiv:1804.04235; Jordan et al., Muon,
        https://kellerjordan.github.io/posts/muon; Liu et al., Muon is Scalable for LLM Training, arXiv:2502.16982;
        ``layerwise`` for the others.
    Example:
        >>> hidden, head = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
        >>> groups = [{"params": [hidden, head], "weight_decay": 0.1}]
        >>> optimizer = make_library_optimizer("muon", groups, lr=1e-3, vocabulary=[head])
        >>> head.sum().backward()
        >>> optimizer.step()
        >>> [sorted(optimizer.state[p]) for p in (hidden, head)]
        [[], ['exp_avg', 'exp_avg_sq', 'step']]
    """
    on_meta = any(p.is_meta for group in groups for p in group["params"])
    if name == "sgd":
        # not fused: torch's fused SGD fails when some parameters have momentum already and others do not
        usual = 0.9 if momentum is None else momentum
        return LibraryOptimizer(torch.optim.SGD(groups, lr=lr, momentum=usual, foreach=False), seed=seed)
    if name == "lars":
        return Lars(
            groups, lr, 0.9 if momentum is None else momentum, trust_coefficient=trust_coefficient,
            adapt_vectors=adapt_vectors, seed=seed,
        )  # fmt: skip
    if name == "lamb":
        return Lamb(groups, lr, betas, eps, adapt_vectors=adapt_vectors, seed=seed)
    if name == "adafactor":
        adafactor = MetaAdafactor if on_meta else torch.optim.Adafactor
        return LibraryOptimizer(adafactor(groups, lr=lr, eps=ADAFACTOR_EPS, foreach=False), seed=seed)
    if name == "muon":
        no_matrix = {id(p) for p in vocabulary}
        hidden, rest = _split(groups, lambda p: p.ndim == 2 and id(p) not in no_matrix)
        inner: list[torch.optim.Optimizer] = []
        if hidden:
            usual = 0.95 if momentum is None else momentum
            inner.append(torch.optim.Muon(hidden, lr=lr, momentum=usual, adjust_lr_fn="match_rms_adamw"))
        if rest:
            inner.append(torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps, foreach=False))
        return LibraryOptimizer(*inner, seed=seed)
    raise UserError(f"optim is '{name}': choose one of {', '.join(get_args(LibraryName))}")


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
        seed: Of the rounding.
    """

    def __init__(self, *inner: torch.optim.Optimizer, seed: int = 0) -> None:
        self._inner = inner
        groups = [
            group | {"inner": number} for number, optimizer in enumerate(inner) for group in optimizer.param_groups
        ]
        super().__init__(groups, {}, seed)

    def update_group(self, group: dict[str, Any]) -> None:
        """Let the library update what has a gradient."""
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
