"""Matrices in 8 and 4 bits."""

import pytest
import torch

from lisatune.memory import few_bits as module
from lisatune.memory.few_bits import NF4, few_bits
from lisatune.memory.ledger import Ledger

SHAPES = [(7, 40), (64, 64), (3, 5), (2, 3, 32), (1, 1)]


def slowly(matrix, bits):
    """What comes back, one element after the other."""
    flat = matrix.float().reshape(-1)
    groups = flat.view(-1, matrix.shape[-1]) if bits == 8 else [flat[i : i + 64] for i in range(0, len(flat), 64)]
    out = []
    for group in groups:
        scale = group.abs().max()
        if bits == 8:
            out += [(x / (scale / 127).clamp(min=1e-30)).round() * (scale / 127) for x in group]
        else:
            values = torch.tensor(NF4)
            out += [values[(values - x / scale.clamp(min=1e-30)).abs().argmin()] * scale for x in group]
    return torch.stack(out).view(matrix.shape).to(matrix.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_what_comes_back_is_that_of_the_slow_way(bits, shape, dtype, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(module, "PIECE", 128)  # several pieces
    matrix = torch.randn(shape, dtype=dtype)
    matrix.view(-1, shape[-1])[0] = 0  # a row of zeros has no scale
    small = few_bits(matrix, bits)
    back = small.restore(small.tensors)
    assert back.dtype == dtype
    assert torch.equal(back, slowly(matrix, bits))
    assert torch.equal(back[(0,) * (len(shape) - 1)], torch.zeros(shape[-1], dtype=dtype))


@pytest.mark.parametrize(("bits", "most"), [(8, 0.007), (4, 0.1)])
def test_a_normal_matrix_comes_back_nearly(bits, most):
    """The bounds are a little above what these formats are known for: 0.6% and 9%."""
    torch.manual_seed(0)
    matrix = torch.randn(256, 256)
    small = few_bits(matrix, bits)
    assert 0 < (small.restore(small.tensors) - matrix).norm() / matrix.norm() < most


@pytest.mark.parametrize(("bits", "num_bytes"), [(8, 128 * 96 + 128 * 4), (4, 128 * 96 // 2 + 128 * 96 // 64 * 4)])
def test_bytes_are_those_of_codes_and_scales(bits, num_bytes):
    with Ledger(granularity=1) as ledger:
        small = few_bits(torch.empty(128, 96, device="meta"), bits)
        assert ledger.total_bytes == num_bytes
        assert small.restore(small.tensors).shape == (128, 96)
    assert sum(t.numel() * t.element_size() for t in small.tensors) == num_bytes


def test_codes_of_4_bits_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    matrix = torch.randn(96, 128)
    codes, state = functional.quantize_4bit(matrix, quant_type="nf4", blocksize=64)
    small = few_bits(matrix, 4)
    assert torch.equal(codes.view(-1), small.tensors[0])
    assert torch.equal(state.absmax.view(-1), small.tensors[1].view(-1))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [64, 48, 7])
def test_a_few_rows_can_be_made_anew(bits, width):
    """The codes are those of the whole matrix with the new rows in it; rows that share a scale are told."""
    matrix = torch.randn(70, width, generator=torch.Generator().manual_seed(0))
    small = few_bits(matrix, bits)
    start, stop = small.apart(20, 31)
    assert start <= 20 < 31 <= stop
    assert (start, stop) == (20, 31) or (bits, width) != (4, 64)
    matrix[20:31] *= 3
    small.rewrite(start, matrix[start:stop])
    assert all(torch.equal(a, b) for a, b in zip(small.tensors, few_bits(matrix, bits).tensors, strict=True))
    matrix[60:] = 0.5
    start, stop = small.apart(60, 70)
    small.rewrite(start, matrix[start:stop])
    assert all(torch.equal(a, b) for a, b in zip(small.tensors, few_bits(matrix, bits).tensors, strict=True))
