"""The optimizer's step taken inside the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lisatune.errors import UserError
from lisatune.levers.base import Lever
from lisatune.optim.adamw import AdamW

if TYPE_CHECKING:
    from lisatune.learner import Learner


@dataclass(kw_only=True)
class OptimizerInBackward(Lever):
    """Puts ``StepInBackward`` on. Weights are updated before the norm is known, so nothing is clipped or left out."""

    needs_our_adamw: ClassVar[bool] = True

    def put_on(self, learner: Learner) -> None:
        """Replace the two points of a step that come too late now."""
        assert isinstance(learner.optimizer, AdamW)
        self.check_experts(learner, "optimizer_in_backward")
        optimizer, sum_gradients = learner.optimizer, learner.placement.sum_gradients
        stepper = StepInBackward(optimizer, lambda p: sum_gradients([p]))

        def clip() -> Tensor:
            optimizer.step()  # updates what waits, and counts the step
            return stepper.grad_norm()

        learner.sum_gradients = lambda: None  # type: ignore[method-assign]
        learner.clip = clip  # type: ignore[method-assign]
        learner.update = lambda bad: None  # type: ignore[method-assign]


class StepInBackward:
    """Updates each parameter as soon as its gradient is complete, and lets the gradient go.

    The gradients of all parameters never exist at once: at most those of one decoder layer do, give or take. The loop
    stays as it is. ``optimizer.step()`` updates what has row gradients, which are complete only then, and counts the
    step; the weights are those of the plain loop, to the bit. Parameters that are frozen now and thawed later are
    served too.

    The global norm is known only when most updates have been made, so there is no clipping by it; and a gradient that
    is gone cannot be added to, so a step has one backward pass.

    Args:
        optimizer: Its learning rate has to be set before the backward pass.
        sum_gradient: Called with a parameter whose gradient is there, before it is used: it may be summed over processes.
    Raises: UserError in a second backward pass of one step.
    Reference: Lv et al., LOMO, arXiv:2306.09782; PyTorch's tutorial "How to save memory by fusing the optimizer step
        into the backward pass".
    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = AdamW([weight], lr=0.1, weight_decay=0.0)
        >>> stepper = StepInBackward(optimizer)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.grad is None, [round(w, 3) for w in weight.tolist()], stepper.grad_norm()
        (True, [2.9, 3.9], tensor(10.))
    """

    def __init__(self, optimizer: AdamW, sum_gradient: Callable[[Tensor], None] = lambda p: None) -> None:
        self.optimizer = optimizer
        self._sum_gradient = sum_gradient
        self._sq_norm: Tensor | None = None
        self._norm: Tensor | None = None
        self._updated: set[Tensor] = set()
        self._handles: list[Any] = [optimizer.register_step_pre_hook(self._finish)]
        for group in optimizer.param_groups:
            for p in group["params"]:
                asked = p.requires_grad
                p.requires_grad_(True)  # torch takes no hook for a frozen tensor, but keeps one when it is frozen
                self._handles.append(p.register_post_accumulate_grad_hook(self._on_gradient))
                p.requires_grad_(asked)

    def grad_norm(self) -> Tensor:
        """The global norm of all gradients of the step last ended by ``optimizer.step()``, a scalar; 0 before the first."""
        return torch.zeros(()) if self._norm is None else self._norm

    def remove(self) -> None:
        """Take the hooks away: from here on the optimizer steps as before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _on_gradient(self, p: Tensor) -> None:
        """Autograd calls this once for each backward pass, when all uses of ``p`` have added their share, or left parts."""
        if p.grad is None or p in self.optimizer.row_gradients:  # what has parts is updated when all passes are over
            return
        if p in self._updated:
            raise UserError(
                "a step in the backward pass cannot add up gradients of several micro-batches: call optimizer.step() "
                "after each backward pass"
            )
        self._sum_gradient(p)
        self._update(p)

    def _update(self, p: Tensor) -> None:
        if self._sq_norm is None:
            self._sq_norm = torch.zeros((), device=p.device)
        self._updated.add(p)
        self.optimizer.update(p, sq_norm=self._sq_norm)
        p.grad = None

    def _finish(self, *_: Any) -> None:
        """Before ``optimizer.step()``: update what waits, and close the sum of squares."""
        for p in self.optimizer.row_gradients.parameters():
            self._update(p)
            self.optimizer.row_gradients.drop(p)
        self._norm = None if self._sq_norm is None else self._sq_norm.sqrt()
        self._sq_norm = None
        self._updated.clear()
