"""The spectral step: the gradient of a matrix, with its singular values made alike. It needs no state."""

from __future__ import annotations

import torch
from torch import Tensor

# x (a + b s + c s^2), s the square of a singular value: five times, it brings values from 0.003 to 1 near 1
COEFFICIENTS = 3.4445, -4.7750, 2.0315
NUM_ITERATIONS = 5


def spectral_step(gradient: Tensor) -> Tensor:
    """The direction of steepest descent where the size of a change is its largest singular value.

    The gradient ``u @ diag(s) @ v`` becomes about ``u @ v``, times the root of the longer side. An element then has a
    root mean square of 1 if no singular value is near 0, so a learning rate moves weights as far as ``optim=sign`` does.
    Muon takes this step of its momentum. Here it is taken of one gradient.

    Why ours: ``torch.optim.Muon`` holds a buffer even with a momentum of 0, and always iterates in bfloat16. Its step cannot
    be taken in the backward pass of a slice, and its weights are rounded to nearest.

    Newton-Schulz iterations find it, which are products of matrices alone. They stop when singular values are between 0.65
    and 1.2. Values below a thousandth of the gradient's norm, which are mostly noise, stay smaller.

    Args:
        gradient: Shape (..., R, C), float32 or bfloat16; each matrix by itself. It does not change.
    Returns: The same shape and type; zero where the gradient is zero.
    Cost: with r the shorter side and c the longer one, 20 r^2 c + 10 r^3 operations, and memory for three matrices (r, c).
    Reference: Jordan et al., Muon, https://kellerjordan.github.io/posts/muon, for the coefficients; Carlson et al.,
        Stochastic Spectral Descent, AISTATS 2015, for the step.
    Example:
        >>> step = spectral_step(torch.diag(torch.tensor([5.0, 1.0, -0.1])))
        >>> (step / 3**0.5).diag().abs().sub(1).abs().max().item() < 0.35
        True
    """
    tall = gradient.shape[-2] > gradient.shape[-1]
    x: Tensor = (gradient.mT if tall else gradient).reshape(-1, *sorted(gradient.shape[-2:]))
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = x / norm.clamp(min=1e-30).to(x.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x.mul_(max(gradient.shape[-2:]) ** 0.5)
    return (x.mT if tall else x).reshape(gradient.shape)
