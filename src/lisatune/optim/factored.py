"""A second moment in factors: one number for each row of a matrix, and one for each of its columns.

Shapes: N matrices that are alike, R rows of each, C columns, r rows of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

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
    """The second moment of gradients, whose element (i, j) is about ``along[i] * across[j]``.

    Adam divides each element of a gradient by the root of its mean square over steps. This needs as much memory as the
    weights. Adafactor keeps the means of each row and each column, and takes their product. What is left of Adam's step if
    its first moment is left out too, then needs next to no memory. Slices keep the means between their turns.

    A matrix is cut ``along`` one dimension. A slice has its own numbers there, which change in its turns alone. Along the
    other dimension, ``across``, all slices of the matrix share their numbers, and each turn changes them. These say only
    how large one is against another: they are divided by their mean. So a slice has the right size from its first turn on.

    No element of a ``bounded`` step is larger than 1. The gradients of a few rows have large outliers, and a product of two numbers does
    not know which they are. Elements that are often larger than now get a smaller step, and this is what the sign lacks.

    Feed it gradients with ``add``, block by block, then call ``advance``, then ask for each block's ``step``. It takes N parameters
    that are alike, as ``stacks`` finds them, so that a GPU starts few kernels.

    Why ours: ``torch.optim.Adafactor`` takes rates that are shares of a weight's size. It knows no slices, no gradients in
    blocks and no steps in the backward pass, and rounds bfloat16 weights to nearest.

    Args:
        parameters: Those that get a step. If they are slices in shards, the processes add up their sums in ``advance``, and
            each holds the same state.
        states: As ``factored_state`` makes them. They change in ``advance``.
    Cost: four bytes for each row and each column, for any number of slices. Two passes over the gradient.
    Reference: Shazeer and Stern, Adafactor, arXiv:1804.04235, algorithm 2.
    Example:
        >>> state = factored_state(gradient := torch.tensor([[3.0, -3.0], [1.0, 1.0]]))
        >>> moment = Factored([gradient], [state])
        >>> moment.add(gradient[None], 0)
        >>> moment.advance(beta=0.999)
        >>> moment.step(gradient[None] / 2, first_row=0, eps=1e-8).round(decimals=4).tolist()
        [[[0.5, -0.5], [0.5, 0.5]]]
    """

    def __init__(self, parameters: Sequence[Tensor], states: Sequence[dict[str, Tensor]]) -> None:
        self.parameter, self.states = parameters[0], states
        cut: Cut | None = getattr(self.parameter, "cut", None)
        self.share = 1.0 if cut is None else len(cut.slots) / cut.num_slices
        self.columns = cut is not None and cut.dim == 1
        self.first_row = 0 if cut is None else cut.first_row(self.parameter)
        self.slice, own = _place(self.parameter)
        self.kept = [state["along_sq"][own] for state in states]  # views
        self.along = torch.stack(self.kept)  # (N, R); of slices of columns (N, C)
        self.across = torch.stack([state[ACROSS] for state in states]) if ACROSS in states[0] else None
        sizes = (self.along.shape[1], 1 if self.across is None else self.across.shape[1])
        self.num_rows, self.num_columns = reversed(sizes) if self.columns else sizes
        # of squares, in rows and in columns
        self.sums = self.along.new_zeros(len(parameters), self.num_rows + self.num_columns)
        self.root = self.along

    def add(self, gradients: Tensor, first_row: int) -> None:
        """Take rows of the gradients in: shape (N, r, C), float32, from row ``first_row`` on."""
        squares = gradients.square()
        first = self.first_row + first_row
        self.sums[:, first : first + squares.shape[1]] = squares.sum(2)
        self.sums[:, self.num_rows :] += squares.sum(1)

    def sq_norm(self) -> Tensor:
        """The sum of squares of what was added, a scalar."""
        return self.sums[:, : self.num_rows].sum()

    def advance(self, beta: float) -> None:
        """Let what was added change the moment, whose decay over steps is ``beta``; a slice has a turn once in many."""
        sums = over_shards(self.sums, self.parameter)
        rows, columns = (
            sums[:, : self.num_rows] / max(1, self.num_columns),
            sums[:, self.num_rows :] / max(1, self.num_rows),
        )
        along, across = (columns, rows) if self.columns else (rows, columns)
        beta_of_turn = beta ** (1 / self.share)
        self.along.lerp_(along, 1 - beta_of_turn)
        torch._foreach_copy_(self.kept, list(self.along.unbind()))
        if self.across is not None:
            self.across.lerp_(across, 1 - beta)
            torch._foreach_copy_([state[ACROSS] for state in self.states], list(self.across.unbind()))
        for state in self.states:
            state["turns"][self.slice] += 1
        seen = [1 - beta_of_turn ** state["turns"][self.slice].item() for state in self.states]
        self.root = (self.along / _column(seen, self.along)).sqrt_()

    def step(self, gradients: Tensor, first_row: int, eps: float, *, bounded: bool = True) -> Tensor:
        """The gradients over the root of the moment, at most 1 and at least -1 if it is ``bounded``.

        Args:
            gradients: Their rows from ``first_row`` on, (N, r, C), float32; (N, r, 1) of vectors. They do not change.
            eps: Added to the root.
        """
        rows = slice(self.first_row + first_row, self.first_row + first_row + gradients.shape[1])
        root = self.root[:, :, None]
        if self.across is not None:
            across = (self.across / self.across.mean(1, keepdim=True).clamp(min=1e-38)).sqrt()
            root = across[:, rows, None] * root.mT if self.columns else root[:, rows] * across[:, None]
        else:
            root = root[:, rows]
        step = gradients / root.add_(eps)
        return step.clamp_(-1, 1) if bounded else step


def stacks(parameters: Iterable[Tensor], most_elements: int) -> Iterator[list[Tensor]]:
    """Parameters that one ``Factored`` can take together, ``most_elements`` at most; a larger one by itself.

    In shards every process makes the same stacks, because it looks at whole shapes.

    Example:
        >>> [len(stack) for stack in stacks([torch.ones(2, 3), torch.ones(3), torch.ones(2, 3), torch.ones(2, 3)], 12)]
        [2, 1, 1]
    """
    alike: dict[Any, list[Tensor]] = {}
    for p in parameters:
        cut: Cut | None = getattr(p, "cut", None)
        shape, of = (p.shape, None) if cut is None else (cut.weight.shape, (cut.dim, cut.num_slices, cut.range_of(p)))
        size = math.prod(shape) // (1 if cut is None else cut.num_slices)
        alike.setdefault((size, shape, p.dtype, p.device, of), []).append(p)
    for (size, *_), same in alike.items():
        at_once = max(1, most_elements // max(1, size))
        yield from (same[start : start + at_once] for start in range(0, len(same), at_once))


def _place(parameter: Tensor) -> tuple[int, slice]:
    """The number of the slice that ``parameter`` is, and its rows or columns."""
    cut: Cut | None = getattr(parameter, "cut", None)
    if cut is None:
        return 0, slice(None)
    slot = next(i for i, candidate in enumerate(cut.slots) if candidate is parameter)
    return cut.blocks[slot] or 0, slice(*cut.ranges[slot])


def _column(numbers: list[float], like: Tensor) -> Tensor | float:
    """Numbers as a column on the device of ``like``; one number if they are all the same."""
    return numbers[0] if len(set(numbers)) == 1 else torch.tensor(numbers, device=like.device)[:, None]
