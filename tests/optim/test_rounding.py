import hashlib

import torch
from hypothesis import given
from hypothesis import strategies as st

from lisatune.optim.rounding import random_bits, round_stochastically

CPU = torch.device("cpu")


def test_rounding_is_unbiased_and_exact_where_it_can_be():
    x = torch.tensor([1.0, -2.5, 0.0, float("inf"), float("-inf"), 1e-3, 3.14159])
    exact = x.bfloat16().float() == x
    many = torch.stack([round_stochastically(x) for _ in range(20_000)]).float()
    assert (many[:, exact] == x[exact]).all()
    finite = x.isfinite()
    spacing = x[finite].abs() / 128
    # the mean of 20,000 draws lies within 5 sigma = 5 * spacing / 2 / sqrt(20,000) of the value
    assert ((many[:, finite].mean(0) - x[finite]).abs() <= 5 * spacing / 2 / 20_000**0.5 + 1e-9).all()


def test_nan_stays_nan_whatever_its_bits():
    """A CUDA device writes NaN as 0x7fffffff, and noise added to it would make it -0."""
    nan = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1, -(2**22)], dtype=torch.int32).view(torch.float32)
    assert round_stochastically(nan, torch.full((4,), 0xFFFF, dtype=torch.int32)).isnan().all()


@given(start=st.integers(0, 2**33), sizes=st.lists(st.integers(0, 300), min_size=1, max_size=4), name=st.text())
def test_bits_do_not_depend_on_the_pieces_they_are_asked_for_in(start, sizes, name):
    pieces, at = [], start
    for size in sizes:
        pieces.append(random_bits(name, at, at + size, CPU))
        at += size
    assert torch.equal(torch.cat(pieces), random_bits(name, start, at, CPU))


def plain_bits(name, number):
    """The slow, clear equal: one element, in Python's integers."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    first, second = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    x = (number + first) % 2**32
    x = ((x ^ x >> 16) * 0x7FEB352D + second) % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    x ^= x >> 16
    return x if x < 2**31 else x - 2**32


@given(st.text(), st.integers(0, 2**33))
def test_bits_equal_the_plain_ones(name, start):
    """So they are the same on every device and with every torch: a run resumed elsewhere draws the same noise."""
    assert random_bits(name, start, start + 20, CPU).tolist() == [plain_bits(name, start + i) for i in range(20)]


def test_bits_look_random():
    """Each statistic of n = 2**18 draws lies within 5 sigma of what independent uniform bits have."""
    n = 2**18
    bits = {name: random_bits(name, 0, n, CPU) for name in ("weight 0 0 0", "weight 0 1 0", "weight 0 0 1", "a", "b")}
    halves = {name: torch.stack([b & 0xFFFF, (b >> 16) & 0xFFFF]).double() / 65535 - 0.5 for name, b in bits.items()}
    sigma = n**-0.5
    for name, b in bits.items():
        ones = torch.stack([(b >> k) & 1 for k in range(32)]).double().mean(1)
        assert (ones - 0.5).abs().max() < 5 * 0.5 * sigma
        together = torch.cat([halves[other] for other in bits])  # (10, n)
        own = halves[name]
        for shift in (0, 1, 2, 255, 256):
            correlation = own @ together.roll(shift, 1).T / n * 12
            if shift == 0:
                row = 2 * list(bits).index(name)
                correlation[:, row : row + 2] -= torch.eye(2).double()  # with itself: 1
                correlation[[0, 1], [row, row + 1]] = 0
            assert correlation.abs().max() < 5 * sigma
        # 256 bins of either half: chi-square with 255 degrees of freedom, mean 255, sigma 22.6
        for half in own:
            counts = torch.histc(half, 256, -0.5, 0.5)
            assert abs(((counts - n / 256) ** 2 / (n / 256)).sum() - 255) < 5 * 22.6


def test_bits_on_meta_have_their_shape():
    bits = random_bits("a", 3, 10, torch.device("meta"))
    assert (bits.shape, bits.dtype, bits.device.type) == ((7,), torch.int32, "meta")
