"""A tensor of the model cut into blocks of rows, of which a few train at a time.

Shapes: R rows of a tensor (all its dimensions but the last, as one), W its width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lisatune.memory.offload import to_device

Rows = tuple[int, int]


def block_rows(num_rows: int, num_slices: int, block: int) -> Rows:
    """First row of block ``block``, and one after its last; the sizes of two blocks differ by one row at most.

    Example:
        >>> [block_rows(7, 3, block) for block in range(3)]
        [(0, 2), (2, 4), (4, 7)]
    """
    return num_rows * block // num_slices, num_rows * (block + 1) // num_slices


class Cut:
    """A parameter and its blocks: the trained ones are parameters of their own, views of the whole one.

    A block's parameter shares the memory of its rows, so an optimizer that updates it in place updates the model, and
    nothing is copied. The whole parameter itself is frozen. A tensor of more than two dimensions, such as stacked
    experts, counts as one matrix of all its rows; of a vector each element is a row.

    If the weight has an attribute ``streamed_to``, a device, it lies in host memory and is brought there to compute. Then
    the slots are copies of their rows on that device, and ``write_back`` puts what was trained into the weight.

    Args:
        name: Name of the parameter in the model.
        weight: The parameter, contiguous.
        num_slices: Blocks that it is cut into. If it has fewer rows, some blocks are empty.
        num_active: Blocks that train at a time.
    Attributes:
        slots: The trained blocks' parameters, ``num_active`` of them. They stay the same objects when blocks change.
        blocks: Which block each slot holds; empty before the first ``place``.
    Example:
        >>> weight = nn.Parameter(torch.zeros(4, 2))
        >>> cut = Cut("weight", weight, num_slices=2, num_active=1)
        >>> cut.place([1])
        >>> _ = cut.slots[0].data.fill_(5.0)
        >>> weight.tolist(), weight.requires_grad
        ([[0.0, 0.0], [0.0, 0.0], [5.0, 5.0], [5.0, 5.0]], False)
    """

    def __init__(self, name: str, weight: nn.Parameter, num_slices: int, num_active: int) -> None:
        self.name = name
        self.weight = weight
        self.num_slices = num_slices
        self.shape = (-1, weight.shape[-1]) if weight.ndim > 1 else (-1,)
        self.width = weight.shape[-1] if weight.ndim > 1 else 1
        self.num_rows = weight.numel() // self.width
        empty = weight.detach().view(self.shape)[:0]
        self.slots = [nn.Parameter(torch.empty_like(empty)) for _ in range(num_active)]
        self.blocks: tuple[int | None, ...] = ()
        self.rows: tuple[Rows, ...] = ()
        weight.cut_into = self  # type: ignore[attr-defined]
        for slot in self.slots:
            slot.cut = self  # type: ignore[attr-defined]

    def place(self, blocks: Iterable[int]) -> None:
        """Put ``blocks`` into the slots: distinct blocks, at most as many as slots. Old gradients are dropped.

        A block that trains already stays in its slot. A slot that is left over, or whose block is empty, is frozen.
        """
        self.weight.grad = None
        self.weight.requires_grad_(False)
        self.blocks = self.arranged(blocks)
        self.rows = tuple(
            (0, 0) if block is None else block_rows(self.num_rows, self.num_slices, block) for block in self.blocks
        )
        whole, device = self.weight.detach().view(self.shape), self.streamed_to
        for slot, (start, stop) in zip(self.slots, self.rows, strict=True):
            slot.grad = None
            block = whole[start:stop] if device is None else to_device(whole[start:stop], device)
            if slot.shape != block.shape:
                # a graph that is still held keeps the shape that gradients must have; another type makes torch forget it
                slot.data = block.new_empty(0, dtype=torch.bfloat16 if block.dtype == torch.float16 else torch.float16)
            slot.data = block
            slot.requires_grad_(start < stop)

    @property
    def streamed_to(self) -> torch.device | None:
        """The device of the slots, if the weight itself lies in host memory."""
        return getattr(self.weight, "streamed_to", None)

    def write_back(self) -> None:
        """Put the values of slots that are copies into the weight; the device may still be at it when this returns."""
        if self.streamed_to is not None:
            self._fill(self.weight)

    def in_copy(self, weight: Tensor) -> Tensor:
        """``weight``, a copy of the whole parameter where the slots are: its trained rows become exact, and it is cut alike."""
        self._fill(weight)
        cut = copy.copy(self)
        cut.weight = weight.detach()  # type: ignore[assignment]  # a circle would keep the copy's memory
        weight.cut_into = cut  # type: ignore[attr-defined]
        return weight

    @torch.no_grad()
    def _fill(self, weight: Tensor) -> None:
        whole = weight.detach().view(self.shape)
        for slot, (start, stop) in zip(self.slots, self.rows, strict=True):
            whole[start:stop].copy_(slot, non_blocking=True)

    def arranged(self, blocks: Iterable[int]) -> tuple[int | None, ...]:
        """What each slot will hold: those of ``blocks`` that train now stay; None for a slot that is left over."""
        wanted = list(blocks)
        new = iter([block for block in wanted if block not in self.blocks])
        return tuple(block if block in wanted else next(new, None) for block in self.blocks or [None] * len(self.slots))

    def empty(self) -> None:
        """Freeze all blocks."""
        self.blocks, self.rows = (), ()
        for slot in self.slots:
            slot.grad = None
            slot.data = slot.new_empty(0)

    def num_elements(self, blocks: Iterable[int]) -> int:
        """Elements of ``blocks``, whether they train now or not."""
        rows = [block_rows(self.num_rows, self.num_slices, block) for block in blocks]
        return sum(stop - start for start, stop in rows) * self.width

    def first_element(self, slot: Tensor) -> int:
        """Where in the flat parameter the block of ``slot`` begins."""
        index = next(i for i, candidate in enumerate(self.slots) if candidate is slot)
        return self.rows[index][0] * self.width

    def is_in_place(self) -> bool:
        """Whether the slots still are the parameter's rows; a move of the model to another device ends it."""
        if self.streamed_to is not None:
            return bool(self.blocks)
        storage = self.weight.untyped_storage()
        return all(slot.untyped_storage() is storage for slot in self.slots)


def cut_of(tensor: Tensor | None) -> Cut | None:
    """The cut of a whole parameter, while blocks of it train; else None."""
    cut: Cut | None = getattr(tensor, "cut_into", None)
    return cut if cut is not None and cut.blocks else None


def whole_of(parameter: Tensor) -> Tensor:
    """The parameter that ``parameter`` is a block of; itself if it is whole."""
    cut: Cut | None = getattr(parameter, "cut", None)
    return parameter if cut is None else cut.weight


def is_view(parameter: Tensor) -> bool:
    """Whether ``parameter`` is a block that lies in the memory of the whole one."""
    whole = whole_of(parameter)
    return whole is not parameter and getattr(whole, "streamed_to", None) is None


class Slots(nn.Module):
    """Holds the slots of a module's cuts, so that ``model.parameters()`` has them; a state dict has not.

    Without it ``clip_grad_norm_(model.parameters(), ...)`` and ``model.zero_grad()`` would miss what trains.
    """

    def __init__(self, slots: Iterable[nn.Parameter]) -> None:
        super().__init__()
        for number, slot in enumerate(slots):
            self.register_parameter(f"{number}", slot)

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Nothing: the whole parameters are saved."""
        return {} if destination is None else destination

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing, as it is not saved."""
