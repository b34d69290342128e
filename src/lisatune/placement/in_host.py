"""Frozen decoder layers in host memory, all else on the device: ``offload_frozen``."""

from __future__ import annotations

import torch
from torch import nn

from lisatune.layers import Layers
from lisatune.levers.offload_frozen import HostLayers, rest_to_device
from lisatune.placement.base import OnDevice


class InHost(OnDevice):
    """Frozen decoder layers stay in host memory and visit the device one at a time. ``HostLayers`` is the whole of it."""

    host_layers: HostLayers

    def place(self, model: nn.Module, layers: Layers, device: torch.device) -> bool:
        """Move all but the decoder layers to the device. The layers must be checkpointed."""
        self.device = device
        rest_to_device(model, layers.decoder, device)
        self.host_layers = HostLayers(layers.decoder, device)
        return layers.head_is_linear()

    def after_switch(self) -> None:
        """Move what trains to the device and what is frozen to host memory."""
        self.host_layers.place()

    def gather(self, model: nn.Module) -> None:
        """Move everything to host memory, which holds the most of it."""
        model.to("cpu")
        self.host_layers.remove(torch.device("cpu"))
