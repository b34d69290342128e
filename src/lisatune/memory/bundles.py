"""Many small tensors handled together: few kernels and few messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor


def bundles(tensors: Iterable[Tensor], most_elements: int) -> Iterator[list[Tensor]]:
    """Neighbours of one type and device, ``most_elements`` together at most; a larger tensor by itself.

    Example:
        >>> import torch
        >>> small, other = torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)
        >>> [len(bundle) for bundle in bundles([small, small, small, other], most_elements=6)]
        [2, 1, 1]
    """
    bundle: list[Tensor] = []
    size = 0
    for tensor in tensors:
        kind = tensor.dtype, tensor.device
        if bundle and (size + tensor.numel() > most_elements or kind != (bundle[0].dtype, bundle[0].device)):
            yield bundle
            bundle, size = [], 0
        bundle.append(tensor)
        size += tensor.numel()
    if bundle:
        yield bundle
