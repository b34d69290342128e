"""A second moment in factors: one number for each row of a matrix, and one for each of its columns.

Shapes: R rows of a matrix, C columns, r rows of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lisatune.errors import UserError
from lisatune.memory.blocks import Cut
from lisatune.processes.tensors import is_sharded, over_shards

ACROSS = "across_sq"  # its presence tells a factored state of a matrix


def owner_of(parameter: Tensor) -> Tensor:
    """The parameter under which an optimizer finds the state: of a slice it is the first slot of its matrix."""
    cut: Cut | None = getattr(parameter, "cut", None)
    return parameter if cut is None else cut.slots[0]


def is_factored(state: dict[str, Tensor]) -> bool:
    """Whether a parameter's optimizer state is a factored second moment."""
    return "along_sq" in state


def factored_state(parameter: Tensor) -> dict[str, Tensor]:
    """The state of ``parameter`` before its first step; of a slice, that of all slices of its matrix together.

    Returns: ``along_sq``, float32, one number for each row; of slices of columns, for each column of the whole matrix.
        ``across_sq``, float32, one for each column (or row); a vector has none. ``turns``, float32, on the CPU: how often
        each slice has trained, (number of slices,).
    Raises: UserError for a whole parameter in shards.
    """
    cut: Cut | None = getattr(parameter, "cut", None)
    if cut is None and is_sharded(parameter):
        raise UserError(
            "a weight in shards has no factored second moment, unless slices of it train: leave factored out"
        )
    whole = parameter if cut is None else cut.weight
    width = whole.shape[-1] if whole.ndim > 1 else 1
    length = whole.numel() // max(1, width)
    along, across = (length, width) if cut is None or cut.dim == 0 else (width, length)
    state = {
        "turns": torch.zeros(1 if cut is None else cut.num_slices),
        "along_sq": torch.zeros(along, dtype=torch.float32, device=parameter.device),
    }
    if whole.ndim > 1:
        state[ACROSS] = torch.zeros(across, dtype=torch.float32, device=parameter.device)
    return state


class Factored:
    """The second moment of a parameter's gradient, whose element (i, j) is about ``along[i] * across[j]``.

    Adam divides each element of a gradient by the root of its mean square over steps. This needs as much memory as the
    weights. Adafactor keeps the means of each row and each column, and takes their product. What is left of Adam's step if
    its first moment is left out too, then needs next to no memory. Slices keep the means between their turns.

    A matrix is cut ``along`` one dimension. A slice has its own numbers there, which change in its turns alone. Along the
    other dimension, ``across``, all slices of the matrix share their numbers, and each turn changes them. These say only
    how large one is against another: they are divided by their mean. So a slice has the right size from its first turn on.

    No element of a ``bounded`` step is larger than 1. The gradients of a few rows have large outliers, and a product of two numbers does
    not know which they are. Elements that are often larger than now get a smaller step, and this is what the sign lacks.

    Feed it the gradient with ``add``, block by block, then call ``advance``, then ask for each block's ``step``.

    Why ours: ``torch.optim.Adafactor`` takes rates that are shares of a weight's size. It knows no slices, no gradients in
    blocks and no steps in the backward pass, and rounds bfloat16 weights to nearest.

    Args:
        parameter: The parameter that gets a step. If it is a slice in shards, the processes add up their sums in
            ``advance``, and each holds the same state.
        state: As ``factored_state`` makes it. It changes in ``advance``.
    Cost: four bytes for each row and each column, for any number of slices. Two passes over the gradient.
    Reference: Shazeer and Stern, Adafactor, arXiv:1804.04235, algorithm 2.
    Example:
        >>> state = factored_state(gradient := torch.tensor([[3.0, -3.0], [1.0, 1.0]]))
        >>> moment = Factored(gradient, state)
        >>> moment.add(gradient, 0)
        >>> moment.advance(beta=0.999)
        >>> moment.step(gradient / 2, first_row=0, eps=1e-8).round(decimals=4).tolist()
        [[0.5, -0.5], [0.5, 0.5]]
    """

    def __init__(self, parameter: Tensor, state: dict[str, Tensor]) -> None:
        cut: Cut | None = getattr(parameter, "cut", None)
        self.parameter, self.state = parameter, state
        self.share, self.slice, self.columns = 1.0, 0, False
        self.along: Tensor = state["along_sq"]
        if cut is not None:
            slot = next(i for i, candidate in enumerate(cut.slots) if candidate is parameter)
            self.slice = cut.blocks[slot] or 0
            self.share = len(cut.slots) / cut.num_slices
            self.columns = cut.dim == 1
            self.along = self.along[slice(*cut.ranges[slot])]
        self.is_matrix = ACROSS in state
        sizes = (len(self.along), len(state[ACROSS]) if self.is_matrix else 1)
        self.num_rows, self.num_columns = reversed(sizes) if self.columns else sizes
        self.first_row = 0 if cut is None else cut.first_row(parameter)
        self.sums = self.along.new_zeros(self.num_rows + self.num_columns)  # of squares, in rows and in columns
        self.corrected: Tensor = self.along

    def add(self, gradient: Tensor, first_row: int) -> None:
        """Take rows of the gradient in: shape (r, C), float32, from row ``first_row`` on."""
        squares = gradient.square()
        first = self.first_row + first_row
        self.sums[first : first + len(squares)] = squares.sum(1)
        self.sums[self.num_rows :] += squares.sum(0)

    def sq_norm(self) -> Tensor:
        """The sum of squares of what was added, a scalar."""
        return self.sums[: self.num_rows].sum()

    def advance(self, beta: float) -> None:
        """Let what was added change the moment, whose decay over steps is ``beta``; a slice has a turn once in many."""
        sums = over_shards(self.sums, self.parameter)
        rows, columns = sums[: self.num_rows] / max(1, self.num_columns), sums[self.num_rows :] / max(1, self.num_rows)
        along, across = (columns, rows) if self.columns else (rows, columns)
        beta_of_turn = beta ** (1 / self.share)
        turns = self.state["turns"]
        turns[self.slice] += 1
        self.along.lerp_(along, 1 - beta_of_turn)
        if self.is_matrix:
            self.state[ACROSS].lerp_(across, 1 - beta)
        self.corrected = self.along / (1 - beta_of_turn ** turns[self.slice].item())

    def step(self, gradient: Tensor, first_row: int, eps: float, *, bounded: bool = True) -> Tensor:
        """The gradient over the root of the moment, at most 1 and at least -1 if it is ``bounded``.

        Args:
            gradient: Rows of the gradient from ``first_row`` on, (r, C), float32; (r, 1) of a vector. It does not change.
            eps: Added to the root.
        """
        rows = slice(self.first_row + first_row, self.first_row + first_row + len(gradient))
        root = self.corrected.sqrt()[:, None]
        if self.is_matrix:
            across = self.state[ACROSS]
            across = (across / across.mean().clamp(min=1e-38)).sqrt()
            root = across[rows, None] * root.T if self.columns else root[rows] * across
        else:
            root = root[rows]
        step = gradient / root.add_(eps)
        return step.clamp_(-1, 1) if bounded else step
