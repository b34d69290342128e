"""The tensors of a checkpoint on their way back, from whole files or from shards.

Two classes with the same functions. ``open_store`` chooses one, and nobody asks again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lisatune.processes.shard_files import Shards, without_rank
from lisatune.run.checkpoint import Checkpoint, Damaged

Parameters = Mapping[str, Tensor]


class WholeFiles:
    """Reads a checkpoint that one process wrote, into a model that one process holds.

    Args:
        checkpoint: The checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def shapes(self, name: str, parameters: Parameters) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors in file ``name``, by their names."""
        with self._open(name) as file:
            return {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118 - not a dict

    @torch.no_grad()
    def read_weights(self, weights: Mapping[str, Parameters]) -> None:
        """Copy saved weights into parameters, which are given by file and name."""
        for name, parameters in weights.items():
            with self._open(name) as file:
                for n, parameter in parameters.items():
                    parameter.copy_(file.get_tensor(n))

    def read_state(self, name: str, parameters: Parameters) -> dict[str, dict[str, Any]]:
        """Optimizer state in file ``name``, by parameter and entry."""
        with self._open(name) as file:
            return _by_parameter({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 - not a dict

    @contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        path = self._checkpoint.folder / f"{name}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise Damaged(f"{path} cannot be read ({error})") from error


class ShardFiles:
    """Reads a checkpoint, whoever wrote it, into a model that is whole or in shards. All processes call it alike.

    Args:
        checkpoint: The checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        try:
            self._shards = Shards(checkpoint.folder)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise Damaged(f"{checkpoint.folder} cannot be read ({error})") from error

    def shapes(self, name: str, parameters: Parameters) -> dict[str, tuple[int, ...]]:
        """Whole shapes of those of ``parameters`` that are saved, by their names."""
        known = self._shards.shapes
        return {n: tuple(known[n]) for n in parameters if n in known}

    def read_weights(self, weights: Mapping[str, Parameters]) -> None:
        """Copy saved weights into parameters, which are given by file and name."""
        self._shards.read({n: p.detach() for parameters in weights.values() for n, p in parameters.items()})

    def read_state(self, name: str, parameters: Parameters) -> dict[str, dict[str, Any]]:
        """Optimizer state of ``parameters``, by parameter and entry, in shards where those are."""
        into: dict[str, Tensor] = {}
        for key, shape in self._shards.shapes.items():
            parameter, dtype = parameters.get(key.partition(":")[2]), self._shards.dtypes[key]
            if parameter is not None:
                alike = shape == parameter.shape
                into[key] = torch.zeros_like(parameter, dtype=dtype) if alike else torch.zeros(shape, dtype=dtype)
        self._shards.read(into)
        return _by_parameter({key: value.detach() for key, value in into.items()})


def open_store(checkpoint: Checkpoint, *, in_shards: bool) -> WholeFiles | ShardFiles:
    """The reader for ``checkpoint``, if the model's weights are ``in_shards`` or whole."""
    written = {name.removesuffix(".safetensors") for name in checkpoint.manifest.files}
    whole = not in_shards and all(name == without_rank(name) for name in written)
    return WholeFiles(checkpoint) if whole else ShardFiles(checkpoint)


def saved_files(checkpoint: Checkpoint) -> set[str]:
    """What a checkpoint has tensors of: ``weights-<part>`` and ``state-<part>``, whoever wrote the files."""
    return {without_rank(name.removesuffix(".safetensors")) for name in checkpoint.manifest.files} - {"state.json"}


def _by_parameter(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """``ENTRY:PARAMETER`` to tensors, sorted by parameter."""
    found: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        entry, _, name = key.partition(":")
        found.setdefault(name, {})[entry] = tensor
    return found
