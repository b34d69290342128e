"""A tensor of the model cut into blocks of rows or of columns, of which a few train at a time.

Shapes: R rows of a tensor (all its dimensions but the last, as one), W its width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lisatune.memory.offload import to_device

NAME = "lisatune_slices"  # name of the modules that hold the trained blocks
Range = tuple[int, int]
SliceOf = Literal["rows", "columns"]


def block_range(length: int, num_slices: int, block: int) -> Range:
    """First row or column of block ``block``, and one after its last; the sizes of two blocks differ by one at most.

    Example:
        >>> [block_range(7, 3, block) for block in range(3)]
        [(0, 2), (2, 4), (4, 7)]
    """
    return length * block // num_slices, length * (block + 1) // num_slices


class Cut:
    """A parameter and its blocks: the trained ones are parameters of their own, views of the whole one.

    A block's parameter shares the memory of its rows or columns, so an optimizer that updates it in place updates the model,
    and nothing is copied. The whole parameter itself is frozen. A tensor of more than two dimensions, such as stacked
    experts, counts as one matrix of all its rows; of a vector each element is a row. Columns are not contiguous: see
    ``elements`` and ``put_elements``.

    If the weight has an attribute ``streamed_to``, a device, it lies in host memory and is brought there to compute. Then
    the slots are copies of their blocks on that device, and ``write_back`` puts what was trained into the weight.

    Args:
        name: Name of the parameter in the model.
        weight: The parameter, contiguous.
        num_slices: Blocks that it is cut into. If it has fewer rows, some blocks are empty.
        num_active: Blocks that train at a time.
        of: What a block is made of. A vector has rows alone.
    Attributes:
        dim: The dimension that is cut, of the matrix of all rows: 0 for rows, 1 for columns.
        slots: The trained blocks' parameters, ``num_active`` of them. They stay the same objects when blocks change.
        blocks: Which block each slot holds; empty before the first ``place``.
        ranges: The rows or columns of each slot.
    Example:
        >>> weight = nn.Parameter(torch.zeros(4, 2))
        >>> cut = Cut("weight", weight, num_slices=2, num_active=1)
        >>> cut.place([1])
        >>> _ = cut.slots[0].data.fill_(5.0)
        >>> weight.tolist(), weight.requires_grad
        ([[0.0, 0.0], [0.0, 0.0], [5.0, 5.0], [5.0, 5.0]], False)
    """

    def __init__(self, name: str, weight: nn.Parameter, num_slices: int, num_active: int, of: SliceOf = "rows") -> None:
        self.name = name
        self.weight = weight
        self.num_slices = num_slices
        self.shape = (-1, weight.shape[-1]) if weight.ndim > 1 else (-1,)
        self.dim = 1 if of == "columns" and weight.ndim > 1 else 0
        self.length = (
            weight.shape[-1] if self.dim == 1 else math.prod(weight.shape[:-1] if weight.ndim > 1 else weight.shape)
        )
        self.slots = [nn.Parameter(torch.empty_like(self.block((0, 0)))) for _ in range(num_active)]
        self.blocks: tuple[int | None, ...] = ()
        self.ranges: tuple[Range, ...] = ()
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
        self.ranges = tuple(
            (0, 0) if block is None else block_range(self.length, self.num_slices, block) for block in self.blocks
        )
        device = self.streamed_to
        for slot, (start, stop) in zip(self.slots, self.ranges, strict=True):
            slot.grad = None
            block = self.block((start, stop))
            block = block if device is None else to_device(block, device)
            if slot.shape != block.shape:
                # a graph that is still held keeps the shape that gradients must have; another type makes torch forget it
                slot.data = block.new_empty(0, dtype=torch.bfloat16 if block.dtype == torch.float16 else torch.float16)
            slot.data = block
            slot.requires_grad_(start < stop)

    def part(self, tensor: Tensor, of: Range) -> Tensor:
        """The rows or columns ``of`` a tensor that is shaped as the weight; a view if the tensor is contiguous."""
        start, stop = of
        return tensor.reshape(self.shape).narrow(self.dim, start, stop - start)

    def block(self, of: Range) -> Tensor:
        """The rows or columns ``of`` the parameter, as far as they lie on this process: a view."""
        return self.part(self.weight.detach(), of)

    @property
    def whole(self) -> Tensor:
        """The whole parameter, where the model computes."""
        return self.weight

    def brought(self, grad: Tensor, of: Range) -> Tensor:
        """The gradient of ``block(of)``, from that of rows or columns ``of`` the whole parameter."""
        return grad

    @property
    def streamed_to(self) -> torch.device | None:
        """The device of the slots, if the weight itself lies in host memory."""
        return getattr(self.weight, "streamed_to", None)

    def write_back(self) -> None:
        """Put the values of slots that are copies into the weight; the device may still be at it when this returns."""
        if self.streamed_to is not None:
            self._fill(self.weight)

    @property
    def of_model(self) -> Cut:
        """The cut of the model's own parameter. Graphs hold this one: that of a copy would keep the copy in memory."""
        cut: Cut = self.slots[0].cut  # type: ignore[attr-defined]
        return cut

    def in_copy(self, weight: Tensor) -> Tensor:
        """``weight``, a copy of the whole parameter where the slots are: its trained block becomes exact, and it is cut alike."""
        self._fill(weight)
        cut = copy.copy(self)
        cut.weight = weight.detach()  # type: ignore[assignment]  # a circle would keep the copy's memory
        weight.cut_into = cut  # type: ignore[attr-defined]
        return weight

    @torch.no_grad()
    def _fill(self, weight: Tensor) -> None:
        for slot, of in zip(self.slots, self.ranges, strict=True):
            # torch copies columns by way of a buffer, which it would read before a GPU has filled it
            self.part(weight.detach(), of).copy_(slot, non_blocking=self.dim == 0)

    def arranged(self, blocks: Iterable[int]) -> tuple[int | None, ...]:
        """What each slot will hold: those of ``blocks`` that train now stay; None for a slot that is left over."""
        wanted = list(blocks)
        new = iter([block for block in wanted if block not in self.blocks])
        return tuple(block if block in wanted else next(new, None) for block in self.blocks or [None] * len(self.slots))

    def empty(self) -> None:
        """Freeze all blocks."""
        self.blocks, self.ranges = (), ()
        for slot in self.slots:
            slot.grad = None
            slot.data = slot.new_empty(0)

    def num_elements(self, blocks: Iterable[int]) -> int:
        """Elements of ``blocks``, whether they train now or not."""
        ranges = [block_range(self.length, self.num_slices, block) for block in blocks]
        return sum(stop - start for start, stop in ranges) * self.across()

    def first_element(self, slot: Tensor) -> int:
        """How many elements of the parameter lie in the blocks before that of ``slot``."""
        return self.range_of(slot)[0] * self.across()

    def range_of(self, slot: Tensor) -> Range:
        """The rows or columns that ``slot`` holds."""
        return next(of for of, candidate in zip(self.ranges, self.slots, strict=True) if candidate is slot)

    def first_row(self, slot: Tensor) -> int:
        """Which row of its block is the first one that ``slot`` holds."""
        return 0

    def across(self) -> int:
        """Elements of a row or of a column."""
        return self.weight.numel() // max(1, self.length)

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


def elements(parameter: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Elements ``start`` to ``stop`` of a parameter, as one row: a view, or a copy if it is a block of columns.

    Example:
        >>> columns = torch.arange(6).view(2, 3)[:, 1:]
        >>> elements(columns, 1, 3).tolist()
        [2, 4]
    """
    return parameter.detach().reshape(-1)[start:stop]


def put_elements(parameter: Tensor, start: int, values: Tensor) -> None:
    """Put ``values``, (n,), where the elements of a parameter begin at ``start``; the equal of a write to ``elements``.

    Cost: of a block of columns all is copied twice, unless ``values`` are all of it.
    """
    if len(values) == parameter.numel():
        parameter.detach().copy_(values.view(parameter.shape))
        return
    flat = parameter.detach().reshape(-1)
    flat[start : start + len(values)] = values
    if not parameter.is_contiguous():
        parameter.detach().copy_(flat.view(parameter.shape))


def cut_in(module: nn.Module, name: str) -> Cut | None:
    """The cut of the parameter ``name`` of ``module``, while blocks of it train; else None.

    While a module computes, FSDP2 has other parameters in it, which know of no cut.
    """
    cut = cut_of(module._parameters.get(name))
    own = module._modules.get(NAME)
    if cut is None and isinstance(own, Slots) and name in own.cuts:
        cut = cut_of(own.cuts[name].weight)
    return cut


class Slots(nn.Module):
    """Holds the slots of a module's cuts, so that ``model.parameters()`` has them; a state dict has not.

    Without it ``clip_grad_norm_(model.parameters(), ...)`` and ``model.zero_grad()`` would miss what trains.

    Args:
        cuts: Those of the module's parameters, by name.
        slots: The slots to hold: of a tied pair one module has them.
    """

    def __init__(self, cuts: dict[str, Cut], slots: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.cuts = cuts
        for number, slot in enumerate(slots):
            self.register_parameter(f"{number}", slot)

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Nothing: the whole parameters are saved."""
        return {} if destination is None else destination

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing, as it is not saved."""
