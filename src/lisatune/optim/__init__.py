"""The optimizers by name. A new one is a file here, and a line in ``OPTIMS``."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lisatune.common.choice import Choice
from lisatune.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class OptimChoice(Choice):
    """An optimizer: a function that makes it, and what is true about it.

    The function takes groups of parameters, then by name what it needs of ``lr``, ``betas``, ``eps``, ``vocabulary``,
    ``ours``, ``state_bits`` (see ``make_optimizer``) and the settings.

    Args:
        in_blocks: It works on a block of rows at a time, as some levers need.
        state_bits: Bits of each moment.
        stateless: It keeps nothing between steps.
        factored: It keeps a factored second moment alone.
        spectral: It takes the spectral step of hidden matrices.
    """

    in_blocks: bool = False
    state_bits: int = 32
    stateless: bool = False
    factored: bool = False
    spectral: bool = False

    @property
    def has_moments(self) -> bool:
        """Whether it keeps numbers for each weight between steps."""
        return not (self.stateless or self.factored)


OURS = "lisatune.optim.build:make_adamw"

OPTIMS: dict[str, OptimChoice] = {
    "adamw": OptimChoice(OURS, in_blocks=True),
    "adamw_16bit": OptimChoice(OURS, in_blocks=True, state_bits=16),
    "adamw_8bit": OptimChoice(OURS, in_blocks=True, state_bits=8, whole=True),
    "sign": OptimChoice(OURS, in_blocks=True, stateless=True, whole=True),
    "factored": OptimChoice(OURS, in_blocks=True, factored=True),
    "spectral": OptimChoice(OURS, in_blocks=True, factored=True, spectral=True, whole=True),
    "sgd": OptimChoice("lisatune.optim.library:make_sgd", whole=True),
    "lars": OptimChoice("lisatune.optim.layerwise:make_lars", whole=True),
    "lamb": OptimChoice("lisatune.optim.layerwise:make_lamb", whole=True),
    "adafactor": OptimChoice("lisatune.optim.library:make_adafactor", whole=True),
    "muon": OptimChoice("lisatune.optim.library:make_muon", whole=True),
}


def make_optimizer(name: str, groups: list[dict[str, Any]], **given: Any) -> torch.optim.Optimizer:
    """The optimizer ``name`` over ``groups``, right while LISA freezes and thaws under it.

    =========  ====================================================  =====================  ==============================
    name       step                                                  state, bytes/element   also reads
    =========  ====================================================  =====================  ==============================
    adamw      ``torch.optim.AdamW`` in float32, ``adamw.AdamW`` in  8                      betas, eps, ours,
               bfloat16 and if ``ours`` is asked for                                        offload_optimizer
    adamw_     ``adamw.AdamW`` with short moments                    4; 2.03                the same
    16bit,
    adamw_
    8bit
    sign       ``adamw.AdamW`` without moments                       0                      eps
    factored   ``adamw.AdamW`` with a factored second moment alone   a row and a column of  betas, eps
                                                                     a matrix; 4 of a vector
    spectral   the same; ``spectral.spectral_step`` of what hidden   the same               betas, eps
               matrices would take
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

    All of them: what has no gradient is left alone (no weight decay, no momentum, no state). A state that was dropped
    begins afresh, its own steps counted. State of the last five is float32, whatever the weights are. bfloat16 weights are
    rounded at random, so that small updates arrive: torch's own would round to nearest, and lose nearly all of them.

    Learning rates mean different things. For adafactor and lars it is a share of the parameter's size (adafactor: at most
    1 / sqrt(t) of its root mean square, at least of 1e-3); for lamb, of its norm; for muon, a root mean square of 0.2 for
    each element of a matrix; for sgd, the gradient's unit.

    Args:
        name: One of ``OPTIMS``.
        groups: Groups of parameters for ``torch.optim.Optimizer``, each with its ``weight_decay``.
        given: What there is to hand on; each optimizer takes what it reads. ``lr``: learning rate. ``betas``: decay of the
            two moments. ``eps``: added to the root of the second. ``vocabulary``: parameters of embeddings and head, which
            are no hidden matrices; nor are vectors, and what has three dimensions, as stacked experts have. ``ours``: a
            lever needs our AdamW. ``seed``: seed of the rounding. ``momentum``: None as in the table.
            ``trust_coefficient``: the paper's eta, see ``Lars``. Other settings by their names.
    Returns: One optimizer over all groups; muon's come apart in two each.
    Raises: UserError for another name.
    Cost: torch's need one to three temporaries of the largest parameter; with bfloat16 weights, its weights and gradient
        in float32 besides, and one call of the library for each parameter. lars and lamb work on blocks.
    Reference: Shazeer and Stern, Adafactor, arXiv:1804.04235; Jordan et al., Muon,
        https://kellerjordan.github.io/posts/muon; Liu et al., Muon is Scalable for LLM Training, arXiv:2502.16982;
        ``layerwise`` for the others.
    Example:
        >>> import torch
        >>> hidden, head = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
        >>> groups = [{"params": [hidden, head], "weight_decay": 0.1}]
        >>> optimizer = make_optimizer("muon", groups, lr=1e-3, vocabulary=[head])
        >>> head.sum().backward()
        >>> optimizer.step()
        >>> [sorted(optimizer.state[p]) for p in (hidden, head)]
        [[], ['exp_avg', 'exp_avg_sq', 'step']]
    """
    if name not in OPTIMS:
        raise UserError(f"optim is '{name}': choose one of {', '.join(OPTIMS)}")
    maker = OPTIMS[name].load()
    given = {"state_bits": OPTIMS[name].state_bits} | given
    reads = inspect.signature(maker).parameters
    optimizer: torch.optim.Optimizer = maker(groups, **{key: value for key, value in given.items() if key in reads})
    return optimizer
