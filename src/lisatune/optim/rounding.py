"""Rounding up or down at random, and the random bits for it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def random_bits(name: str, start: int, stop: int, device: torch.device) -> Tensor:
    """32 random bits for each of the elements ``start`` to ``stop`` of a stream that ``name`` alone decides.

    Each element's bits are a hash of its number, so a stream is the same on every device and in every version of
    torch, whatever the pieces it is asked for in, and in whatever order. A ``torch.Generator`` offers none of these.

    Args:
        name: Any text; other names give unrelated streams.
        start: Number of the first element.
        stop: One after the last.
        device: Device of the result; on the meta device nothing is computed, as always there.
    Returns: int32, shape (stop - start,).
    Cost: 14 passes over the elements; a second tensor of this size while they last.
    Reference: the mixing is Wellons' lowbias32, https://nullprogram.com/blog/2018/07/31, with a key between its rounds.
    Example:
        >>> device = torch.device("cpu")
        >>> whole = random_bits("a", 0, 10, device)
        >>> torch.equal(whole[4:], random_bits("a", 4, 10, device)), torch.equal(whole, random_bits("b", 0, 10, device))
        (True, False)
    """
    first, second = keys_of(name, start)
    x = torch.arange(stop - start, dtype=torch.int32, device=device)
    return _mixed(x.add_(first), second)


def bits_of_keys(keys: Tensor, count: int) -> Tensor:
    """What ``random_bits`` gives for ``count`` elements, with ``keys_of`` its name and start as a tensor.

    Example:
        >>> keys, device = torch.tensor(keys_of("a", 4), dtype=torch.int32), torch.device("cpu")
        >>> torch.equal(bits_of_keys(keys, 6), random_bits("a", 4, 10, device))
        True
    """
    return _mixed(torch.arange(count, dtype=torch.int32, device=keys.device).add_(keys[0]), keys[1])


def keys_of(name: str, start: int) -> tuple[int, int]:
    """The two numbers, each of 32 bits and signed, that make the noise of a stream from element ``start`` on."""
    first, second = _keys(name)
    return _signed(first + start), _signed(second)


def random_bits_of(streams: Sequence[tuple[str, int, int]], device: torch.device) -> Tensor:
    """What ``random_bits`` gives for each of ``streams``, name, start and stop, one after the other; in one pass.

    For many short pieces, of which each would cost a GPU 14 small kernels.

    Example:
        >>> device = torch.device("cpu")
        >>> bits = random_bits_of([("a", 2, 5), ("b", 0, 2)], device)
        >>> torch.equal(bits[:3], random_bits("a", 2, 5, device)), torch.equal(bits[3:], random_bits("b", 0, 2, device))
        (True, True)
    """
    return bits_of_spread(spread_of(streams, device))


def spread_of(streams: Sequence[tuple[str, int, int]], device: torch.device) -> Tensor:
    """Two numbers for each element of ``streams``, which make its bits: int32, shape (elements, 2)."""
    keys, lengths, position = [], [], 0
    for name, start, stop in streams:
        first, second = _keys(name)
        keys.append((_signed(first + start - position), _signed(second)))
        lengths.append(stop - start)
        position += stop - start
    # the CPU does not wait for the copy, nor for the device to add up the lengths
    at_hand = [torch.tensor(numbers).to(device, non_blocking=True) for numbers in (keys, lengths)]
    return at_hand[0].to(torch.int32).repeat_interleave(at_hand[1], dim=0, output_size=position)


def bits_of_spread(spread: Tensor) -> Tensor:
    """The bits of what ``spread_of`` gave, int32."""
    x = torch.arange(len(spread), dtype=torch.int32, device=spread.device).add_(spread[:, 0])
    return _mixed(x, spread[:, 1])


def _keys(name: str) -> tuple[int, int]:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _mixed(x: Tensor, key: Tensor | int) -> Tensor:
    # int32 wraps around, which is what a hash wants; its shift copies the sign, which is masked away
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_signed(0x7FEB352D)).add_(key)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(0x846CA68B))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _signed(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31


def round_stochastically(x: Tensor, noise: Tensor | None = None) -> Tensor:
    """``x`` in bfloat16, rounded up or down with the chances that make the mean right.

    Adds uniform noise to the 16 bits that bfloat16 drops, then drops them.

    Args:
        x: float32, any shape.
        noise: 0 to 65535, int32, shape of ``x``; default: drawn from torch's generator.
    Returns: bfloat16, same shape; values that bfloat16 holds exactly, infinities and NaN are unchanged.
    Reference: Zamirai et al., Revisiting BFloat16 Training, arXiv:2010.06192.
    Example:
        >>> x = torch.full((100_000,), 1.001)
        >>> abs(round_stochastically(x).float().mean().item() - 1.001) < 1e-4
        True
    """
    if noise is None:
        noise = torch.randint(0, 2**16, x.shape, dtype=torch.int32, device=x.device)
    rounded = (x.view(torch.int32) + noise).bitwise_and_(-(2**16)).view(torch.float32).bfloat16()
    return torch.where(x.isnan(), x.bfloat16(), rounded)  # the noise could carry a NaN over to -0
