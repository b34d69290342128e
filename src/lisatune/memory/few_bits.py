"""Matrices in 8 or 4 bits, with the scales that bring them back near to what they were.

Shapes: R rows of a matrix (all its dimensions but the last, as one), W its width, N = R * W its elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 64  # elements of NF4 that share a scale
PIECE = 2**22  # elements that are worked on at a time: 16 MiB of each float32 temporary

# the 16 values of NF4, which split a normal distribution into equal shares (QLoRA, appendix E)
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Whole:
    """A tensor as it is, for whoever also handles ``FewBits``."""

    tensors: tuple[Tensor]

    def restore(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensor itself."""
        return tensors[0]


@dataclass(frozen=True)
class FewBits:
    """A matrix in 8 or 4 bits.

    Attributes:
        bits: 8: int8 codes with a scale for each row. 4: NF4, two codes in a byte, with a scale for each 64 elements.
        shape: Shape of the matrix.
        dtype: Its dtype, which ``restore`` gives back.
        tensors: Codes, int8 of shape (R, W) or uint8 of shape (N / 2,), and float32 scales, (R, 1) or (N / 64, 1). N is
            rounded up to a multiple of 64.
    Reference: Dettmers et al., LLM.int8(), arXiv:2208.07339, for rows; QLoRA, arXiv:2305.14314, for NF4.
    """

    bits: int
    shape: torch.Size
    dtype: torch.dtype
    tensors: tuple[Tensor, Tensor]

    @torch.no_grad()
    def restore(self, tensors: Sequence[Tensor]) -> Tensor:
        """The matrix from ``tensors``, this object's own or copies of them on another device.

        Cost: some 3 float32 temporaries of ``PIECE`` elements.
        """
        codes, scales = tensors
        if self.bits == 8:
            matrix = torch.empty(codes.shape, dtype=self.dtype, device=codes.device)
            for rows in _pieces(len(codes), codes.shape[-1]):
                matrix[rows] = codes[rows] * scales[rows]
            return matrix.view(self.shape)
        values = torch.tensor(NF4, device=codes.device)
        pairs = torch.stack((values.repeat_interleave(16), values.repeat(16)), dim=1)  # both values of a byte
        matrix = torch.empty(len(scales), BLOCK, dtype=self.dtype, device=codes.device)
        for blocks in _pieces(len(scales), BLOCK):
            indices = codes.view(-1, BLOCK // 2)[blocks].reshape(-1).int()
            matrix[blocks] = pairs.index_select(0, indices).view(-1, BLOCK) * scales[blocks]
        return matrix.view(-1)[: self.shape.numel()].view(self.shape)

    def apart(self, start: int, stop: int) -> tuple[int, int]:
        """The rows ``start`` to ``stop``, and those around them with which they share a scale."""
        step = 1 if self.bits == 8 else BLOCK // math.gcd(BLOCK, self.shape[-1])
        return start // step * step, min(-(-stop // step) * step, self.shape.numel() // self.shape[-1])

    @torch.no_grad()
    def rewrite(self, start: int, rows: Tensor) -> None:
        """Make codes and scales of ``rows`` anew, (r, W), which begin at row ``start`` and are ``apart`` from others.

        The result is that of ``few_bits`` of the whole matrix with these rows in it.
        """
        first = start if self.bits == 8 else start * self.shape[-1] // BLOCK
        for ours, new in zip(self.tensors, few_bits(rows, self.bits).tensors, strict=True):
            by_scale = ours.view(len(self.tensors[1]), -1)
            new = new.view(-1, by_scale.shape[1])
            by_scale[first : first + len(new)].copy_(new, non_blocking=True)


@torch.no_grad()
def few_bits(matrix: Tensor, bits: int) -> FewBits:
    """``matrix`` in 8 or 4 bits, on its device. Equal matrices give equal codes.

    Args:
        matrix: At least two dimensions, contiguous, any floating dtype.
        bits: 8 or 4.
    Cost: 1 byte an element and 4 a row, or 0.5625 bytes an element.
    Example:
        >>> matrix = torch.tensor([[1.0, -0.5, 0.25], [0.0, 8.0, 0.0]])
        >>> small = few_bits(matrix, 8)
        >>> small.tensors[0].tolist()
        [[127, -64, 32], [0, 127, 0]]
        >>> (small.restore(small.tensors) - matrix).abs().max().item() < 0.5 / 127
        True
    """
    if bits == 8:
        rows = matrix.detach().reshape(-1, matrix.shape[-1])
        scales = rows.abs().amax(dim=1, keepdim=True).float() / 127
        codes = torch.empty(rows.shape, dtype=torch.int8, device=matrix.device)
        for piece in _pieces(len(rows), rows.shape[-1]):
            codes[piece] = (rows[piece] / scales[piece].clamp(min=1e-30)).round_()
        return FewBits(8, matrix.shape, matrix.dtype, (codes, scales))
    flat = matrix.detach().reshape(-1)
    if rest := -len(flat) % BLOCK:
        flat = torch.nn.functional.pad(flat, (0, rest))
    blocks = flat.view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True).float()
    values = torch.tensor(NF4, device=matrix.device)
    borders = (values[1:] + values[:-1]) / 2
    codes = torch.empty(len(blocks), BLOCK // 2, dtype=torch.uint8, device=matrix.device)
    for piece in _pieces(len(blocks), BLOCK):
        scaled = blocks[piece] / scales[piece].clamp(min=1e-30)
        nearest = torch.bucketize(scaled, borders, out_int32=True)
        codes[piece] = nearest[:, 0::2] * 16 + nearest[:, 1::2]
    return FewBits(4, matrix.shape, matrix.dtype, (codes.view(-1), scales))


def _pieces(rows: int, width: int) -> list[Any]:
    step = max(1, PIECE // max(1, width))
    return [slice(start, start + step) for start in range(0, rows, step)]
