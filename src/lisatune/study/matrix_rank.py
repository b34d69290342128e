"""How many directions a change has; sizes of products that are never made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lisatune.study.start_weights import blocks_of


def product_norm(up: Tensor, down: Tensor) -> float:
    """Frobenius norm of ``up @ down``, which is never made: ``sqrt(trace((up.T @ up) @ (down @ down.T)))``.

    Args:
        up: Shape (out, r).
        down: Shape (r, in).
    Cost: r * r * (out + in) multiplications in float64.
    Example:
        >>> up, down = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 0.0, 4.0]])
        >>> round(product_norm(up, down) ** 2, 9)
        125.0
    """
    norm: float = (_gram(_tall(up)) * _gram(_tall(down.mT))).sum().clamp(min=0).sqrt().item()
    return norm


def product_singular_values(up: Tensor, down: Tensor) -> Tensor:
    """Singular values of ``up @ down``, the largest first, from a matrix of r x r: with QR, up = Q R and down.T = Q' R',
    they are those of R R'.T.

    Args:
        up: Shape (out, r).
        down: Shape (r, in).
    Returns: min(out, in) values, float64, on the CPU: zeros after the r-th.
    Cost: r * r * (out + in) multiplications, three times or so, in float64.
    """
    most = min(up.shape[0], down.shape[1])
    r_up = torch.linalg.qr(up.detach().double(), mode="r").R
    r_down = torch.linalg.qr(down.detach().double().mT, mode="r").R
    values = torch.linalg.svdvals(r_up @ r_down.mT).cpu()[:most]
    return torch.cat([values, values.new_zeros(most - len(values))])


def change_singular_values(blocks: Iterable[Tensor]) -> Tensor:
    """Singular values of a tall matrix that comes as blocks of rows, the largest first: roots of the eigenvalues of
    its Gram matrix.

    Squaring costs half of the digits: a value below 1e-7 of the largest is rounding.

    Args:
        blocks: Shape (some, n) each, float64.
    Returns: n values, float64, on the CPU.
    Cost: rows * n * n multiplications and an eigenvalue problem of n x n in float64: of a 4,096 x 4,096 matrix 128 MiB
        three times, and some 10 s on a CPU core.
    """
    values: Tensor = torch.linalg.eigvalsh(_gram(blocks)).clamp(min=0).sqrt().flip(0).cpu()
    return values


def _gram(blocks: Iterable[Tensor]) -> Tensor:
    gram: Tensor | None = None
    for block in blocks:
        gram = block.mT @ block if gram is None else gram.addmm_(block.mT, block)
    assert gram is not None
    return gram


def _tall(matrix: Tensor) -> Iterator[Tensor]:
    for index in blocks_of(matrix.shape):
        yield matrix.detach()[index].double()


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of ``values / values.sum()``: how many directions a matrix with these singular values has.

    k equal values give k; it is never more than their number, and 0 if all are 0.

    Reference: Roy and Vetterli, The effective rank, EUSIPCO 2007.
    Example:
        >>> round(effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])), 6), effective_rank(torch.zeros(3))
        (3.0, 0.0)
    """
    if values.sum() == 0:
        return 0.0
    shares = values / values.sum()
    rank: float = torch.special.entr(shares).sum().exp().item()
    return rank


def stable_rank(values: Tensor) -> float:
    """``values.square().sum() / values.max() ** 2``: how many of the largest direction would make the same norm.

    Never more than ``effective_rank``'s count of values that are not 0, and far less sensitive to small ones.

    Example:
        >>> stable_rank(torch.tensor([2.0, 2.0, 0.0])), stable_rank(torch.zeros(3))
        (2.0, 0.0)
    """
    largest = values.max()
    return 0.0 if largest == 0 else (values.square().sum() / largest.square()).item()
