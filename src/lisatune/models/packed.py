"""Attention over packed rows, each document by itself, without a mask of all pairs of tokens.

Shapes: B rows, T positions, H heads, D width of a head. Keys and values may have fewer heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lisatune.errors import UserError
from lisatune.layers import Layers

PACKED = "lisatune_packed"
HALVES = (torch.bfloat16, torch.float16)


def register() -> None:
    """Register ``attn_implementation=PACKED``: transformers' ``sdpa``, but packed rows need no mask."""
    AttentionInterface.register(PACKED, attention)
    AttentionMaskInterface.register(PACKED, documents_or_mask)


@torch.no_grad()
def check_packing(layers: Layers, device: torch.device) -> None:
    """Refuse packing for a model in which a packed document would see the one before; found by trying it.

    A model that needs a mask gets one.

    Raises: UserError.
    """
    layers.model.eval()
    model: Any = layers.model
    if model.config._attn_implementation == PACKED and not (_has_kernels(device) and _keeps_apart(layers, device)):
        model.set_attn_implementation("sdpa")
    if model.config._attn_implementation != PACKED and not _keeps_apart(layers, device):
        raise UserError(
            f"packing=true: {type(model).__name__} would mix packed documents with each other; leave packing out"
        )


def _keeps_apart(layers: Layers, device: torch.device) -> bool:
    first, second = torch.tensor([[1, 2, 3, 4]], device=device), torch.tensor([[5, 6, 7]], device=device)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]], device=device)
    try:
        together = layers.trunk(input_ids=torch.cat([first, second], dim=1), position_ids=positions)[:, 4:]
    except Exception:
        if layers.model.config._attn_implementation == PACKED:  # type: ignore[union-attr]
            return False  # its own code works on the mask
        raise
    alone = layers.trunk(input_ids=second, position_ids=positions[:, 4:])
    # rounding differs with the shapes; a leak changes the hidden states by a share of their size
    return bool((together - alone).abs().max() <= 0.02 * alone.abs().max())


@torch.enable_grad()
def _has_kernels(device: torch.device) -> bool:
    """Whether attention over documents works on ``device``, forward and backward, with this PyTorch; found by trying it."""
    if device.type not in ("cpu", "cuda"):
        return False
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    documents = Documents(torch.tensor([[True, False, False, True, False]]), device)
    made = []
    for where in (documents, documents.mask):
        generator = torch.Generator(device).manual_seed(0)
        query, key, value = (
            torch.randn(1, heads, 5, 64, generator=generator, device=device, dtype=dtype, requires_grad=True)
            for heads in (4, 2, 2)
        )
        module = nn.Module()
        module.num_key_value_groups = 2  # type: ignore[assignment]
        try:
            out, _ = attention(module, query, key, value, where)
            made.append([out, *torch.autograd.grad(out.float().square().sum(), (query, key, value))])
        except (AttributeError, ImportError, RuntimeError, TypeError):
            return False
    return all(torch.allclose(a, b, rtol=0.05, atol=0.05) for a, b in zip(*made, strict=True))  # bfloat16


class Documents:
    """Where the documents of packed rows begin; a model passes it on to each layer in place of a mask.

    Args:
        begins: Whether a document begins there, (B, T), bool, on the CPU; true at the first position of each row.
        device: Where the model computes.
    Example:
        >>> documents = Documents(torch.tensor([[True, False, True]]), torch.device("cpu"))
        >>> list(documents.places()), documents.longest
        ([(0, 0, 2), (0, 2, 3)], 2)
    """

    def __init__(self, begins: Tensor, device: torch.device) -> None:
        self.begins, self.device = begins, device
        starts = begins.flatten().nonzero().squeeze(1)
        self.edges: list[int] = [*starts.tolist(), begins.numel()]

    def places(self) -> Iterator[tuple[int, int, int]]:
        """Row, first position and the position after the last of each document."""
        width = self.begins.shape[1]
        for start, end in zip(self.edges, self.edges[1:], strict=False):
            yield start // width, start % width, start % width + end - start

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(end - start for start, end in zip(self.edges, self.edges[1:], strict=False))

    @cached_property
    def edges_on_device(self) -> Tensor:
        """``edges`` as a kernel wants them, int32."""
        return torch.tensor(self.edges, dtype=torch.int32).to(self.device, non_blocking=True)

    @cached_property
    def mask(self) -> Tensor:
        """The slow, clear equal: which position sees which, (B, 1, T, T), bool."""
        number = self.begins.cumsum(1).to(self.device)
        return (number[:, None, :, None] == number[:, None, None, :]).tril()


def documents_or_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, *, mask_function: Any,
    attention_mask: Tensor | None = None, local_size: int | None = None, allow_is_causal_skip: bool = True,
    use_vmap: bool = False, device: torch.device, **more: Any,
) -> Documents | Tensor | None:  # fmt: skip
    """What transformers asks for before the first layer: ``Documents`` of packed rows, and else the mask of ``sdpa``.

    ``mask_function`` tells of any two positions whether the one sees the other. So the documents are found by asking
    each position whether it sees the one before. Windows, chunks and padding get a mask as before.
    """
    is_special = allow_is_causal_skip or use_vmap or attention_mask is not None or local_size is not None
    if not (is_special or q_offset or kv_offset) and q_length == kv_length > 1:
        rows, later = torch.arange(batch_size, device=device)[:, None], torch.arange(1, q_length, device=device)
        sees = torch.stack([mask_function(rows, 0, later, later - 1), mask_function(rows, 0, later - 1, later)])
        before, after = sees.cpu()
        if not after.any():
            return Documents(nn.functional.pad(~before, (1, 0), value=True), device)
    found: Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function=mask_function, attention_mask=attention_mask,
        local_size=local_size, allow_is_causal_skip=allow_is_causal_skip, use_vmap=use_vmap, device=device, **more,
    )  # fmt: skip
    return found


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Documents | Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as transformers' layers call it: (B, H, T, D) to (B, T, H, D)."""
    if not isinstance(attention_mask, Documents):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)  # type: ignore[no-any-return]
    query, key = query.to(value.dtype), key.to(value.dtype)  # positions are float32 under autocast
    is_plain = all(t.stride(-1) == 1 and t.shape[-1] == query.shape[-1] for t in (query, key, value))
    has_kernel = is_plain and not dropout and more.get("position_bias") is None
    if has_kernel and query.device.type == "cpu":
        return _ByDocument.apply(query, key, value, attention_mask, scaling).transpose(1, 2), None  # type: ignore[no-untyped-call]
    if has_kernel and query.is_cuda and query.dtype in HALVES and query.shape[-1] <= 256:
        return varlen(query, key, value, attention_mask, scaling), None
    return sdpa_attention_forward(module, query, key, value, attention_mask.mask, dropout, scaling, **more)  # type: ignore[no-any-return]


def varlen(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float | None) -> Tensor:
    """PyTorch's kernel for rows of different lengths: ``attention`` on a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    rows, heads, tokens, width = query.shape
    query, key, value = (t.transpose(1, 2).reshape(rows * tokens, -1, width) for t in (query, key, value))
    edges, longest = documents.edges_on_device, documents.longest
    out: Any = varlen_attn(
        query, key, value, edges, edges, longest, longest, scale=scale, window_size=(-1, 0),
        enable_gqa=heads != key.shape[1],
    )  # fmt: skip
    return out.view(rows, tokens, heads, width)  # type: ignore[no-any-return]


class _ByDocument(torch.autograd.Function):
    """PyTorch's fused attention for CPUs on each document; what is kept is what it keeps of rows with one document."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float | None
    ) -> Tensor:
        rows, heads, tokens, width = query.shape
        out = query.new_empty(rows, tokens, heads, width).transpose(1, 2)
        sums = query.new_empty(rows, heads, tokens, dtype=torch.promote_types(query.dtype, torch.float32))
        for row, start, end in documents.places():
            place = slice(row, row + 1), slice(None), slice(start, end)
            out[place], sums[place] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[place], key[place], value[place], 0.0, True, scale=scale
            )
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.documents, ctx.scale = documents, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, sums = ctx.saved_tensors
        grads = [t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (query, key, value)]
        for row, start, end in ctx.documents.places():
            place = slice(row, row + 1), slice(None), slice(start, end)
            made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad[place], query[place], key[place], value[place], out[place], sums[place], 0.0, True, scale=ctx.scale
            )
            for whole, part in zip(grads, made, strict=True):
                whole[place] = part
        return (*grads, None, None)
