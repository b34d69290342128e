"""Frozen decoder layers in host memory, all else on the device: ``offload_frozen`` and ``frozen_bits``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lisatune.layers import Layers
from lisatune.levers.offload_frozen import HostLayers, rest_to_device
from lisatune.placement.base import OnDevice


class InHost(OnDevice):
    """Frozen decoder layers stay in host memory. ``HostLayers`` is the whole of it.

    Args:
        bits: Bits of their matrices while training, 8 or 4; None for the exact ones.
        stream: Keep nothing of them on the device. Else their copies in few bits stay there.
    """

    host_layers: HostLayers

    def __init__(self, bits: int | None = None, *, stream: bool = True) -> None:
        self.bits = bits
        self.stream = stream

    def place(self, model: nn.Module, layers: Layers, device: torch.device, dtype: torch.dtype | None = None) -> bool:
        """Move all but the decoder layers to the device. The layers must be checkpointed."""
        self.device = device
        rest_to_device(model, layers.decoder, device, dtype)
        self.host_layers = HostLayers(layers.decoder, device, bits=self.bits, stream=self.stream, dtype=dtype)
        return layers.head_is_linear()

    def after_switch(self) -> None:
        """Move what trains to the device and what is frozen to host memory."""
        self.host_layers.place()

    def after_step(self) -> None:
        """Put what slices have learned into host memory."""
        self.host_layers.write_back()

    def weights_changed(self) -> None:
        """Make the copies in few bits anew."""
        self.host_layers.renew()

    def copies(self) -> list[Tensor]:
        """Codes and scales of the frozen matrices, if they are held in few bits."""
        return self.host_layers.copies()

    def gather(self, model: nn.Module) -> None:
        """Move everything to host memory, which holds the most of it."""
        model.to("cpu")
        self.host_layers.remove(torch.device("cpu"))
