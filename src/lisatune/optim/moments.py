"""Adam's two moments, held in 32, 16 or 8 bits and worked on a span of elements at a time.

Shapes: n elements of a span, G = ceil(n / 256) groups of elements that share a scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lisatune.errors import UserError
from lisatune.memory.offload import host_zeros, side_stream
from lisatune.optim.rounding import round_stochastically

StateBits = Literal[32, 16, 8]
Span = tuple[int, int]

GROUP = 256  # elements that share a scale, as in bitsandbytes
FIRST_TOP, SECOND_TOP = 127, 255  # the largest int8 and uint8
SMALLEST_SCALE = 1e-28  # 255**4 / 1e-28 is still a float32; it also makes a group of zeros no special case


@dataclass(frozen=True)
class Moments:
    """How the moments of a parameter are held between steps, as plain tensors of ``optimizer.state[p]``.

    ====  ==========================================  ==================================================  ===========
    bits  ``exp_avg``, the first moment               ``exp_avg_sq``, the second moment                   bytes, both
    ====  ==========================================  ==================================================  ===========
    32    float32                                     float32                                             8
    16    bfloat16                                    bfloat16                                            4
    8     int8 c, worth sign(c) * s * (c / 127)**2    uint8 c, worth s * (c / 255)**4                     2 + 8 / 256
    ====  ==========================================  ==================================================  ===========

    s is the largest magnitude of 256 consecutive elements, float32, in ``exp_avg_scale`` and ``exp_avg_sq_scale``. The
    maps are curved because second moments of one group differ by many powers of ten: equal steps would send the small
    ones to zero, and their update, divided by the root, would explode.

    What does not fit is rounded at random, up with the probability (x - lower) / (upper - lower), so that the mean of
    the value is right. With beta2 = 0.999 a step changes the second moment by about 0.1%, and two codes lie 1.6% apart
    or more (bfloat16: 0.4%): rounding to nearest would leave it where it is for ever.

    Why ours: bitsandbytes and torchao hold 8-bit states too, but bitsandbytes rounds states and bfloat16 weights to
    nearest, and neither can update a span of a parameter, which row gradients and states off the device need.

    Args:
        bits: 32, 16 or 8.
        on_host: Keep them in host memory (pinned, for a parameter on CUDA).
    Raises: UserError for other bits.
    Reference: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861 (another map).
    Example:
        >>> moments, weight = Moments(8), torch.zeros(512)
        >>> state = moments.zeros(weight)
        >>> for start, stop, block in moments.walk(state, [(0, 256), (256, 512)], weight.device):
        ...     first, second = moments.load(block)
        ...     moments.store(block, first + 1, second + 4, torch.zeros(256, dtype=torch.int32))
        >>> [(name, t.dtype, t[0].item()) for name, t in state.items() if name != "exp_avg_scale"]
        [('exp_avg', torch.int8, 127), ('exp_avg_sq', torch.uint8, 255), ('exp_avg_sq_scale', torch.float32, 4.0)]
    """

    bits: StateBits = 32
    on_host: bool = False

    def __post_init__(self) -> None:
        if self.bits not in get_args(StateBits):
            raise UserError(f"state_bits is {self.bits}: choose 32, 16 or 8")

    def dtypes(self) -> dict[str, torch.dtype]:
        """Names of the tensors that hold the moments, to their types."""
        if self.bits == 8:
            codes = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}
            return codes | {"exp_avg_scale": torch.float32, "exp_avg_sq_scale": torch.float32}
        dtype = torch.float32 if self.bits == 32 else torch.bfloat16
        return {"exp_avg": dtype, "exp_avg_sq": dtype}

    def zeros(self, p: Tensor) -> dict[str, Tensor]:
        """Both moments of ``p`` before its first step: codes or values in its shape, scales (ceil(p.numel() / 256),)."""
        groups = (-(-p.numel() // GROUP),)
        shapes = {name: groups if name.endswith("scale") else p.shape for name in self.dtypes()}
        return {name: self.place(torch.Size(shapes[name]), dtype, p) for name, dtype in self.dtypes().items()}

    def place(self, shape: torch.Size, dtype: torch.dtype, p: Tensor) -> Tensor:
        """Zeros where the moments of ``p`` live."""
        return host_zeros(shape, dtype, p) if self.on_host else torch.zeros(shape, dtype=dtype, device=p.device)

    def walk(
        self, state: dict[str, Any], spans: list[Span], device: torch.device
    ) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """Visit ``spans`` one after the other: start, stop, and the parts of the state's tensors, on ``device``.

        What is written into the parts has reached ``state`` when the walk has ended (for pinned memory: when the
        current stream has come so far). A span begins at a multiple of 256, and the first is the longest.

        Cost: nothing for a state on the device, whose parts are views. From the host, two spans' bytes on the device:
        the next span comes while one is worked on. On a CPU, where a copy waits for the one before, one span's bytes.
        """
        parts = [_parts(state, self.dtypes(), span) for span in spans]
        if self.on_host:
            yield from _walk_host(parts, spans, device)
        else:
            for (start, stop), part in zip(spans, parts, strict=True):
                yield start, stop, part

    def load(self, block: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Both moments in float32, shape (n,); of 32 bits the very tensors that hold them."""
        first, second = block["exp_avg"], block["exp_avg_sq"]
        if self.bits == 8:
            return (
                _values(first, block["exp_avg_scale"], FIRST_TOP),
                _values(second, block["exp_avg_sq_scale"], SECOND_TOP),
            )
        return first.float(), second.float()

    def store(self, block: dict[str, Tensor], first: Tensor, second: Tensor, bits: Tensor | None) -> None:
        """Write both moments back into the tensors they were loaded from.

        Args:
            block: What ``walk`` gave.
            first: float32, shape (n,).
            second: float32, shape (n,), not negative. One that is positive stays so: else the update would be divided
                by eps alone.
            bits: 32 random bits for each element, int32, shape (n,); None for 32 bits of state, which need none.
        """
        if self.bits == 32:
            block["exp_avg"].copy_(first)
            block["exp_avg_sq"].copy_(second)
            return
        assert bits is not None
        low, high = bits & 0xFFFF, (bits >> 16).bitwise_and_(0xFFFF)
        if self.bits == 16:
            block["exp_avg"].copy_(round_stochastically(first, low))
            block["exp_avg_sq"].copy_(round_stochastically(second, high))
            return
        codes, scale = _codes(first, FIRST_TOP, low)
        block["exp_avg"].copy_(codes.copysign_(first))
        block["exp_avg_scale"].copy_(scale)
        codes, scale = _codes(second, SECOND_TOP, high)
        block["exp_avg_sq"].copy_(torch.maximum(codes, second.sign()))
        block["exp_avg_sq_scale"].copy_(scale)


def _power(x: Tensor, top: int) -> Tensor:
    """``x**2`` for the first moment, ``x**4`` for the second, in place."""
    return x.square_() if top == FIRST_TOP else x.square_().square_()


def _exponent(top: int) -> int:
    return 2 if top == FIRST_TOP else 4


def _values(codes: Tensor, scale: Tensor, top: int) -> Tensor:
    """What codes (n,) with scales (G,) are worth, float32 (n,)."""
    values = codes.float()
    if top == FIRST_TOP:
        values.mul_(values.abs())  # the square, with its sign
    else:
        _power(values, top)
    return _grouped(values).mul_((scale / top ** _exponent(top))[:, None]).view(-1)[: len(codes)]


def _codes(x: Tensor, top: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (n,) of the magnitudes of ``x`` (n,), still in float32, and scales (G,); noise int32 (n,), 0 to 65535."""
    groups = _grouped(x).abs()
    scale = groups.amax(1).clamp_(min=SMALLEST_SCALE)
    wanted = groups.mul_((top ** _exponent(top) / scale)[:, None]).view(-1)[: len(x)]  # value, in units of code 1
    codes = wanted.sqrt()
    if top == SECOND_TOP:
        codes.sqrt_()
    codes.floor_()
    lower, upper = _power(codes.clone(), top), _power(codes + 1, top)
    chance = noise.float().add_(0.5).mul_(2**-16)  # never 0, so that a value which has a code of its own keeps it
    codes.add_(lower.lerp_(upper, chance).lt_(wanted))
    return codes.clamp_(max=top), scale  # a largest that comes out above the top must not become -128


def _grouped(x: Tensor) -> Tensor:
    """``x`` (n,) as (G, 256): a view, or a copy filled up with zeros."""
    missing = -len(x) % GROUP
    return (torch.nn.functional.pad(x, (0, missing)) if missing else x).view(-1, GROUP)


def _parts(state: dict[str, Any], names: dict[str, torch.dtype], span: Span) -> dict[str, Tensor]:
    """Views of the elements ``span`` of each tensor, and of the scales that belong to them."""
    start, stop = span
    assert start % GROUP == 0
    groups = slice(start // GROUP, -(-stop // GROUP))
    return {name: state[name][groups] if name.endswith("scale") else state[name].view(-1)[start:stop] for name in names}


def _walk_host(
    parts: list[dict[str, Tensor]], spans: list[Span], device: torch.device
) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """Bring each part to ``device``, hand it out, send it back; on CUDA on the side stream, the next one beforehand.

    The tensors on the device are made once and used by turns. New ones for each span would be handed out by a CPU that
    runs ahead of the device, and the whole state would come to lie there.
    """
    side = side_stream(device)
    ahead = 0 if device.type == "cpu" else 1  # meta does as CUDA does, for the planner
    slots = [{name: torch.empty_like(t, device=device) for name, t in parts[0].items()} for _ in range(1 + ahead)]
    came: list[torch.cuda.Event | None] = [None] * len(slots)
    brought: list[dict[str, Tensor]] = []

    def bring(number: int) -> None:
        slot = slots[number % len(slots)]
        with torch.cuda.stream(side):  # the side stream keeps order: the slot's last content has left before this comes
            brought.append(
                {name: slot[name][: len(t)].copy_(t, non_blocking=True) for name, t in parts[number].items()}
            )
        came[number % len(slots)] = side.record_event() if side else None

    if side:  # the slots' memory may have been used by work still queued, and the state written by it
        side.wait_stream(torch.cuda.current_stream(device))
    if ahead:
        bring(0)
    for number, (start, stop) in enumerate(spans):
        if number + ahead < len(spans):
            bring(number + ahead)
        event = came[number % len(slots)]
        if event:
            torch.cuda.current_stream(device).wait_event(event)
        yield start, stop, brought[number]
        if side:
            side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for name, t in parts[number].items():
                t.copy_(brought[number][name], non_blocking=True)
    if side:  # the slots may be handed out again, and the state be read, from here on
        torch.cuda.current_stream(device).wait_stream(side)
