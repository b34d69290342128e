"""LARS and LAMB: the step of each parameter in proportion to its norm."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lisatune.memory.blocks import elements
from lisatune.optim.rounded import RoundedOptimizer

BLOCK = 2**22  # elements worked on at a time: 16 MiB in float32
CPU_BLOCK = 2**20  # where larger ones leave the cache


class Block(NamedTuple):
    """Some elements of a parameter, each tensor of shape (n,): float32, ``weight`` and ``grad`` not to be written to."""

    start: int
    weight: Tensor
    grad: Tensor
    moments: dict[str, Tensor]  # views of the state
    group: dict[str, Any]
    t: float  # steps of this parameter, this one included


class Layerwise(RoundedOptimizer):
    """Walks over each parameter twice, a block at a time: once for two norms, once for the update that they scale."""

    def update_group(self, group: dict[str, Any]) -> None:
        """Update what has a gradient; the rest gets neither state nor weight decay."""
        for p in group["params"]:
            if p.grad is not None:
                self._update(p, group)

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())
            state.update({name: torch.zeros_like(p, dtype=torch.float32) for name in self.moment_names(group)})
        state["step"] += 1
        squares = torch.zeros(2, device=p.device)
        for block in _blocks(p, state, group):
            other = self.accumulate(block)
            squares += torch.stack([torch.dot(block.weight, block.weight), torch.dot(other, other)])
        weight_norm, other_norm = squares.sqrt()
        ratio = torch.ones((), device=p.device)
        if p.ndim >= 2 or group["adapt_vectors"]:
            wanted = self.trust_ratio(weight_norm, other_norm, group)
            ratio = torch.where((weight_norm > 0) & (other_norm > 0), wanted, ratio)
        for block in _blocks(p, state, group):
            self.write(p, block.start, block.weight - self.change(block, ratio * group["lr"]), group["num_steps"])

    @abstractmethod
    def moment_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """What is kept of a parameter between steps, each in its shape."""

    @abstractmethod
    def accumulate(self, block: Block) -> Tensor:
        """Bring the moments up to date, if norms need it; returns that whose norm is compared with the weight's."""

    @abstractmethod
    def trust_ratio(self, weight_norm: Tensor, other_norm: Tensor, group: dict[str, Any]) -> Tensor:
        """The factor of the learning rate, for two norms above 0."""

    @abstractmethod
    def change(self, block: Block, rate: Tensor) -> Tensor:
        """What is taken off the weight, at the learning rate of this parameter."""


def _blocks(p: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Iterator[Block]:
    assert p.grad is not None
    weights, grads, t = elements(p), p.grad.reshape(-1), state["step"].item()
    flat = {name: moment.view(-1) for name, moment in state.items() if name != "step"}
    size = CPU_BLOCK if p.device.type == "cpu" else BLOCK
    for start in range(0, p.numel(), size):
        part = slice(start, start + size)
        moments = {name: moment[part] for name, moment in flat.items()}
        yield Block(start, weights[part].float(), grads[part].float(), moments, group, t)


class Lars(Layerwise):
    """SGD with momentum whose step is a given share of each parameter's norm::

        ratio = trust_coefficient * norm(p) / (norm(g) + weight_decay * norm(p))
        v = momentum * v + lr * ratio * (g + weight_decay * p)
        p -= v

    The ratio is 1 where one of the norms is 0, and for vectors (norms and biases) unless told otherwise: they take a
    step of plain SGD. What has no gradient is left alone: no momentum, no weight decay, no state.

    Why ours: ``pytorch_optimizer`` 4.1 overwrites ``p.grad``, takes trust_coefficient / weight_decay for the ratio where
    the gradient is 0, and leaves no choice for vectors; timm needs torchvision. Both round bfloat16 weights to nearest.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        momentum: Decay of the running sum of steps; 0 keeps none.
        weight_decay: Added to the gradient, as in the paper: not decoupled.
        trust_coefficient: The paper's eta. It has 0.001 and learning rates from 1 to 32; with 1, the learning rate
            itself is the share of the norm that a step moves, and is of a size that vectors can bear too.
        adapt_vectors: Scale the steps of vectors as well.
        seed: Seed of the stochastic rounding of bfloat16 weights.
    Cost: 4 bytes of state an element that trains, float32 whatever the weights are; temporaries of a block of 2**22
        elements (2**20 on a CPU); the gradient is read twice.
    Reference: You, Gitman and Ginsburg, Large Batch Training of Convolutional Networks, arXiv:1708.03888, algorithm 1.
    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = Lars([weight], lr=0.1)
        >>> weight.grad = torch.tensor([[0.0, 1e-6]])
        >>> optimizer.step()
        >>> weight.tolist()  # a tenth of its norm, 5, however small the gradient
        [[3.0, 3.5]]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        trust_coefficient: float = 1.0,
        adapt_vectors: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient,
            "adapt_vectors": adapt_vectors,
        }  # fmt: skip
        super().__init__(params, defaults, seed)

    def moment_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def accumulate(self, block: Block) -> Tensor:
        return block.grad

    def trust_ratio(self, weight_norm: Tensor, other_norm: Tensor, group: dict[str, Any]) -> Tensor:
        return weight_norm.mul(group["trust_coefficient"]).div(other_norm + group["weight_decay"] * weight_norm)

    def change(self, block: Block, rate: Tensor) -> Tensor:
        change = block.grad.add(block.weight, alpha=block.group["weight_decay"]).mul_(rate)
        if not block.group["momentum"]:
            return change
        return block.moments["momentum_buffer"].mul_(block.group["momentum"]).add_(change)


class Lamb(Layerwise):
    """Adam whose step is a given share of each parameter's norm::

        m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g * g
        u = m / (1 - beta1**t) / (sqrt(v / (1 - beta2**t)) + eps) + weight_decay * p
        p -= lr * norm(p) / norm(u) * u

    The ratio of the norms counts as 1 where one of them is 0, and for vectors (norms and biases) unless told otherwise:
    theirs is a step of AdamW. t is counted for each parameter, so a layer that begins late, or begins again, is
    corrected for its own few steps. What has no gradient is left alone: no moments, no weight decay, no state.

    Why ours: ``pytorch_optimizer`` 4.1 counts t for a whole group, so a layer that is first trained late begins with a
    fraction of its step; it also corrects m alone, and takes no norm of a weight above 10. timm 1.0 counts so too, where it shows
    in vectors alone, and needs torchvision. LAMB of bitsandbytes 0.50 is an Adam that steps no further
    than the norm. All round bfloat16 weights to nearest.

    Args:
        params: Parameters or groups.
        lr: Learning rate: the share of the norm that a step moves.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Inside the ratio, as in the paper.
        adapt_vectors: Scale the steps of vectors as well.
        seed: Seed of the stochastic rounding of bfloat16 weights.
    Cost: 8 bytes of state an element that trains, float32 whatever the weights are; temporaries of a block of 2**22
        elements (2**20 on a CPU); the update is computed twice.
    Reference: You et al., Large Batch Optimization for Deep Learning, arXiv:1904.00962, algorithm 2.
    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = Lamb([weight], lr=0.1)
        >>> weight.grad = torch.tensor([[0.0, 1e-3]])
        >>> optimizer.step()
        >>> [round(w, 4) for w in weight[0].tolist()]  # a tenth of its norm, 5
        [3.0, 3.5]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        adapt_vectors: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt_vectors": adapt_vectors}
        super().__init__(params, defaults, seed)

    def moment_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

    def accumulate(self, block: Block) -> Tensor:
        beta1, beta2 = block.group["betas"]
        block.moments["exp_avg"].lerp_(block.grad, 1 - beta1)
        block.moments["exp_avg_sq"].mul_(beta2).addcmul_(block.grad, block.grad, value=1 - beta2)
        return _adam(block)

    def trust_ratio(self, weight_norm: Tensor, other_norm: Tensor, group: dict[str, Any]) -> Tensor:
        return weight_norm / other_norm

    def change(self, block: Block, rate: Tensor) -> Tensor:
        return _adam(block).mul_(rate)


def _adam(block: Block) -> Tensor:
    """The paper's r + lambda x: Adam's step and weight decay, before they are scaled."""
    beta1, beta2 = block.group["betas"]
    root = (block.moments["exp_avg_sq"] / (1 - beta2**block.t)).sqrt_().add_(block.group["eps"])
    step: Tensor = (block.moments["exp_avg"] / (1 - beta1**block.t)).div_(root)
    return step.add_(block.weight, alpha=block.group["weight_decay"])


def make_lars(
    groups: list[dict[str, Any]], lr: float, momentum: float | None = None, trust_coefficient: float = 1.0,
    adapt_vectors: bool = False, seed: int = 0,
) -> Lars:  # fmt: skip
    """``Lars``, with a momentum of 0.9 if none is given."""
    return Lars(
        groups, lr, 0.9 if momentum is None else momentum, trust_coefficient=trust_coefficient,
        adapt_vectors=adapt_vectors, seed=seed,
    )  # fmt: skip


def make_lamb(
    groups: list[dict[str, Any]], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
    adapt_vectors: bool = False, seed: int = 0,
) -> Lamb:  # fmt: skip
    """``Lamb``."""
    return Lamb(groups, lr, betas, eps, adapt_vectors=adapt_vectors, seed=seed)
