"""All weights whole on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lisatune.data.loader import Batch
from lisatune.layers import Layers
from lisatune.models.load import save_model

Hook = Callable[..., None]


class OnDevice:
    """All weights of the model are whole, on the device that computes.

    The other placements are subclasses that replace what differs. ``place`` is called once, before everything else.

    Attributes:
        in_shards: Whether a process holds a shard of each weight only.
        device: Where the model computes, from ``place`` on.
    """

    in_shards: ClassVar[bool] = False
    device: torch.device

    def place(self, model: nn.Module, layers: Layers, device: torch.device, dtype: torch.dtype | None = None) -> bool:
        """Put the weights where they stay. Returns ``layers.head_is_linear()``, which needs them whole.

        Weights that lie in the type of their files become ``dtype`` here, a tensor or a layer at a time.
        """
        self.device = device
        convert(model.parameters(), dtype, device)
        model.to(device)
        return layers.head_is_linear()

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``function(*args, **kwargs)``, which runs the model: meanwhile its weights are at hand."""
        return function(*args, **kwargs)

    def share(self, batch: Batch) -> Batch:
        """What this process computes of ``batch``."""
        return batch

    def passes(self, micro_batches: Iterable[Batch]) -> Iterable[Batch]:
        """The micro-batches of a step, each of which goes through one backward pass."""
        return micro_batches

    def total(self, value: Tensor) -> Tensor:
        """Sum over the processes of what each has computed of its share; may be in place."""
        return value

    def add_up(self, part: Tensor) -> Tensor:
        """Sum of a part of a gradient over the processes, float32, in place. All come to it in the same order."""
        return part

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum the gradients of ``parameters`` over the processes, if the backward pass has not done so."""

    def after_switch(self) -> None:
        """Parameters were frozen or thawed."""

    def after_step(self) -> None:
        """An optimizer step is over."""

    def watch(self, layers: Layers, *, gathering: Hook, computing: Hook, backward: Hook) -> None:
        """Call hooks when weights are gathered, when a layer computes and when a call's forward pass is over.

        For the forecast. Here nothing is gathered, so nothing is called.
        """

    def weights_changed(self) -> None:
        """Weights were read from a checkpoint."""

    def copies(self) -> list[Tensor]:
        """Tensors that stand for weights besides the parameters; for the forecast."""
        return []

    def gather(self, model: nn.Module) -> None:
        """Put all weights of ``model`` in one memory, so that adapters can be merged. Training is over."""

    def adapter(self, model: nn.Module) -> dict[str, Tensor] | None:
        """LoRA's tensors, whole, for whoever saves them; None if peft may take them as they are."""
        return None

    def save_model(self, model: Any, tokenizer: Any, folder: Path, decoder_name: str | None) -> None:
        """Write a Hugging Face folder."""
        model.requires_grad_(True)
        save_model(model, tokenizer, folder)

    @property
    def can_write_behind(self) -> bool:
        """Whether a checkpoint is written while training goes on: there are copies of the weights then."""
        return self.device.type == "cuda"

    def to_save(self, tensor: Tensor, *, behind: bool) -> Tensor:
        """``tensor`` for ``write``, on the CPU; a copy if it is written ``behind``, while training goes on."""
        found = tensor.detach().to("cpu", copy=behind and tensor.device.type == "cpu")
        return found.contiguous()

    def write(self, folder: Path, files: Mapping[str, Mapping[str, Tensor]]) -> list[Path]:
        """Write safetensors files, by names without their ending. Returns those that this process wrote."""
        return write_files(folder, files)


def convert(parameters: Iterable[nn.Parameter], dtype: torch.dtype | None, device: torch.device | None = None) -> None:
    """Give ``parameters`` another floating type (and device) in place; None and equal types change nothing."""
    for p in parameters:
        if dtype is not None and p.is_floating_point() and p.dtype != dtype:
            p.data = p.data.to(device or p.device, dtype)


def write_files(folder: Path, files: Mapping[str, Mapping[str, Tensor]]) -> list[Path]:
    """Write ``files``, names without ``.safetensors`` to named tensors on the CPU, into ``folder``. Returns their paths."""
    paths = []
    for name, tensors in files.items():
        path = folder / f"{name}.safetensors"
        save_file(dict(tensors), path)
        path.chmod(0o644)  # safetensors writes 0600; a checkpoint is for whoever may read its folder
        paths.append(path)
    return paths
