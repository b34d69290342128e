"""AdamW for weights held in bfloat16: small updates arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class AdamW(torch.optim.Optimizer):
    """AdamW with float32 moments whose update of a bfloat16 weight is rounded up or down at random.

    A bfloat16 holds 8 bits of mantissa: an update smaller than 1/512 of a weight, which is most of them at usual
    learning rates, is lost when rounded to nearest. Stochastic rounding lets it arrive on average, at no memory at all.
    In float32 this is ``torch.optim.AdamW``, to rounding::

        p -= lr * weight_decay * p
        m += (1 - beta1) * (g - m);  v += (1 - beta2) * (g * g - v)
        p -= lr / (1 - beta1**t) * m / (sqrt(v / (1 - beta2**t)) + eps)

    Args:
        params: Parameters or groups; those without a gradient are skipped and get no state.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, a share of the weight for each unit of learning rate.
        seed: Of the rounding; noise depends on it and on the number of the step alone, so a resumed run repeats it.
    Cost: 8 bytes of state for a parameter that trains; temporaries of one parameter at a time, in float32.
    Reference: Loshchilov and Hutter, arXiv:1711.05101; Zamirai et al., Revisiting BFloat16 Training, arXiv:2010.06192.
    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        >>> optimizer = AdamW([weight], lr=1e-4, weight_decay=0.0)
        >>> for _ in range(10):
        ...     weight.grad = torch.ones_like(weight); optimizer.step()
        >>> 0.998 < weight.float().mean().item() < 1.0  # round to nearest would leave it at 1
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "num_steps": 0})
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        generators: dict[torch.device, torch.Generator] = {}
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.device not in generators:
                    noise_seed = (self.seed * 1_000_003 + group["num_steps"]) % 2**63 + number
                    generators[p.device] = torch.Generator(p.device).manual_seed(noise_seed)
                self._update(p, group, generators[p.device])
            group["num_steps"] += 1
        return loss

    def _update(self, p: Tensor, group: dict[str, Any], generator: torch.Generator) -> None:
        assert p.grad is not None
        state, grad = self.state[p], p.grad.float()
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        t = state["step"].item()
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt_().add_(group["eps"])
        weight = p.float() if p.dtype != torch.float32 else p
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - beta1**t))
        if p.dtype == torch.bfloat16:
            p.copy_(round_stochastically(weight, generator))
        elif weight is not p:
            p.copy_(weight)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer`` does, but the moments stay float32, which it would cast to the weight's type."""
        super().load_state_dict(state_dict)
        flat = [p for group in self.param_groups for p in group["params"]]
        for index, saved in state_dict["state"].items():
            p = flat[index]
            self.state[p] = {k: v.to(p.device, copy=True) if v.ndim else v.clone() for k, v in saved.items()}


def round_stochastically(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """``x`` in bfloat16, rounded up or down with the chances that make the mean right.

    Adds uniform noise to the 16 bits that bfloat16 drops, then drops them.

    Args:
        x: float32, any shape.
        generator: Of the noise, on the device of ``x``.
    Returns: bfloat16, same shape; values that bfloat16 holds exactly, infinities and NaN are unchanged.
    Example:
        >>> x = torch.full((100_000,), 1.001)
        >>> abs(round_stochastically(x).float().mean().item() - 1.001) < 1e-4
        True
    """
    noise = torch.randint(0, 2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    rounded = (x.view(torch.int32) + noise).bitwise_and_(-(2**16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()
