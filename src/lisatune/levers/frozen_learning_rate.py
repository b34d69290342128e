"""Small steps of frozen layers, from the gradients of activations that the backward pass makes anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lisatune.errors import UserError
from lisatune.levers.base import Lever
from lisatune.optim.rounding import random_bits, round_stochastically

if TYPE_CHECKING:
    from lisatune.learner import Learner

Step = Literal["gradient", "sign"]
BLOCK = 2**22  # elements of a gradient that exist at a time


@dataclass(kw_only=True)
class FrozenLearningRate(Lever):
    """Puts ``FrozenUpdates`` on. Its rate follows the schedule of the learning rate. The arguments are settings."""

    frozen_learning_rate: float
    frozen_step: Step
    learning_rate: float
    seed: int
    updates: FrozenUpdates = field(init=False, repr=False)

    def put_on(self, learner: Learner) -> None:
        """Make the matrices of frozen decoder layers step in the backward pass."""
        self.check_experts(learner, "frozen_learning_rate")
        self.updates = FrozenUpdates(
            learner.layers.decoder, self.frozen_learning_rate, self.seed, sign=self.frozen_step == "sign",
            add_up=learner.placement.add_up,
        )  # fmt: skip

    def before_step(self, learner: Learner, number: int) -> None:
        """Keep the ratio between the two rates, whatever the schedule does."""
        group = learner.optimizer.param_groups[0]
        self.updates.number = number
        ratio = self.frozen_learning_rate / self.learning_rate
        self.updates.lr = ratio * group["lr"] / group.get("lr_ratio", 1.0)

    def also_trains(self, learner: Learner) -> set[str]:
        """All decoder layers, from the first step on."""
        begun = learner.engine is not None and learner.engine.drawn is not None
        return {part for part in learner.layers.parts() if part.startswith("layers.")} if begun else set()


class FrozenUpdates:
    """Plain gradient descent on the matrices of frozen decoder layers, inside the backward pass and with no state::

        weight -= lr * grad_output.T @ input

    LISA freezes a layer, but the gradient of its output passes through on the way to the layers and the embedding below.
    Together with the layer's input that is all that the gradient of its matrices takes. So frozen layers move a little
    too, instead of waiting at a point that the others have left.

    It breaks LISA's rule that frozen bytes do not change, so it has to be asked for. A gradient is made a block of rows
    at a time, and used after the gradient of the input, for which the old weight counts: a step equals that of
    ``torch.optim.SGD`` on these matrices, to rounding. One backward pass is one step; nothing is clipped.

    Args:
        decoder: The decoder layers. The forward of each ``nn.Linear`` in them is replaced.
        lr: Learning rate of these steps. Its unit is the gradient's, as for SGD, not Adam's.
        seed: Seed of the rounding of bfloat16 weights.
        sign: Step by the gradient's sign, so that ``lr`` is a distance, as with Adam. FRUGAL does so, at a tenth of the
            learning rate in fine-tuning.
        add_up: Sums a block of a gradient over the processes, in place.
    Attributes:
        lr: May be changed between steps.
        number: Number of the optimizer step, which seeds the rounding; to be set before each one.
    Raises: UserError if no decoder layer holds an ``nn.Linear`` with floating-point weights.
    Cost: for frozen layers above the lowest one that trains, the third unit of matrix work, and their inputs, kept for
        the backward pass as those of active layers are; with checkpointing of one layer at a time.
    Reference: the idea is BREAD's (openreview.net/forum?id=DBybUx7ARy), which takes such steps on the inactive blocks of BAdam;
        Zmushko et al., FRUGAL, arXiv:2411.07837, for steps by the sign.
    Example:
        >>> layer = nn.Sequential(nn.Linear(2, 1, bias=False)).requires_grad_(False)
        >>> _ = layer[0].weight.fill_(1.0)
        >>> updates = FrozenUpdates([layer], lr=0.5)
        >>> layer(torch.tensor([[1.0, 3.0]], requires_grad=True)).sum().backward()
        >>> layer[0].weight.tolist()
        [[0.5, -0.5]]
    """

    def __init__(
        self, decoder: Sequence[nn.Module], lr: float, seed: int = 0, *, sign: bool = False,
        add_up: Callable[[Tensor], Tensor] = lambda block: block,
    ) -> None:  # fmt: skip
        self.lr = lr
        self.add_up = add_up
        self.sign = sign
        self.seed = seed
        self.number = 0
        modules = [m for layer in decoder for m in layer.modules() if isinstance(m, nn.Linear)]
        modules = [m for m in modules if m.weight.is_floating_point()]
        if not modules:
            raise UserError(
                "no decoder layer holds an nn.Linear, so frozen layers cannot take small steps: leave frozen_learning_rate out"
            )
        for place, module in enumerate(modules):
            module.forward = partial(self._forward, module, place)  # type: ignore[method-assign]

    def _forward(self, module: nn.Linear, place: int, input: Tensor) -> Tensor:
        if module.weight.requires_grad or not (torch.is_grad_enabled() and input.requires_grad):
            return linear(input, module.weight, module.bias)
        out: Tensor = _SteppingLinear.apply(input, module.weight, module.bias, self, place)  # type: ignore[no-untyped-call]
        return out

    @torch.no_grad()
    def step(self, weight: Tensor, grad: Tensor, input: Tensor, place: int) -> None:
        """Move ``weight``, (O, I), by the gradients of its outputs, (N, O), and its inputs, (N, I)."""
        rows = max(1, BLOCK // weight.shape[1])
        for start in range(0, len(weight), rows):
            block = weight[start : start + rows]
            change = self.add_up((grad[:, start : start + rows].T @ input).float())
            change = (change.sign_() if self.sign else change).mul_(self.lr)
            moved = block.float().sub_(change)
            if weight.dtype == torch.bfloat16:
                first = start * weight.shape[1]
                name = f"inactive {self.seed} {self.number} {place}"
                bits = random_bits(name, first, first + block.numel(), weight.device)
                moved = round_stochastically(moved.view(-1), bits.bitwise_and_(0xFFFF)).view_as(block)
            block.copy_(moved)


class _SteppingLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, updates: FrozenUpdates, place: int
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.updates, ctx.place = updates, place
        return linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        input, weight = ctx.saved_tensors
        grad_input = grad @ weight
        ctx.updates.step(weight, grad.flatten(0, -2), input.flatten(0, -2), ctx.place)
        return grad_input, None, None, None, None
