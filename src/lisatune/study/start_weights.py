"""The weights that a run began with, read again instead of kept where that is possible."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lisatune.errors import UserError

BLOCK = 2**21  # elements of a weight that are compared at a time: at most four float32 or two float64 blocks, 32 MiB
Index = tuple[slice, ...]


class StartWeights:
    """Weights as they were at the start: in safetensors that hold the very same, or copied to host memory."""

    def __init__(self, model: nn.Module, source: str | Path | None) -> None:
        self._files = _tensors_in(source)
        self._prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self._aliases: dict[int, list[str]] = {}  # a tied tensor is in the file under one of its names
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._aliases.setdefault(id(parameter), []).append(name)
        self._copies: dict[str, Tensor] = {}
        self._found: dict[str, tuple[Path, str]] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}

    @property
    def host_bytes(self) -> int:
        return sum(copy.numel() * copy.element_size() for copy in self._copies.values())

    @property
    def num_in_files(self) -> int:
        return len(self._found)

    def add(self, name: str, parameter: nn.Parameter, *, in_file: bool) -> None:
        names = [alias for alias in self._aliases[id(parameter)] if in_file]
        for candidate in (*names, *(alias.removeprefix(self._prefix) for alias in names)):
            if candidate in self._files and self._is_in_file(self._files[candidate], candidate, parameter):
                self._found[name] = (self._files[candidate], candidate)
                self._stamps[self._files[candidate]] = _stamp(self._files[candidate])
                return
        self._copies[name] = parameter.detach().to("cpu", copy=True)

    def _is_in_file(self, path: Path, name: str, parameter: nn.Parameter) -> bool:
        with safe_open(path, framework="pt") as file:
            if file.get_slice(name).get_shape() != list(parameter.shape) or parameter.ndim == 0:
                return False
        return all(
            torch.equal(_read(path, name, index, parameter), parameter[index].detach())
            for index in blocks_of(parameter.shape)
        )

    def block(self, name: str, index: Index, like: Tensor) -> Tensor:
        """A block in float32, where ``like`` is."""
        if name in self._copies:
            return self._copies[name][index].to(like.device).float()
        path, key = self._found[name]
        try:
            if _stamp(path) == self._stamps[path]:
                return _read(path, key, index, like).float()
        except (OSError, SafetensorError):
            pass
        raise UserError(
            f"{path} has changed since the run began, so the layers' changes cannot be measured: put it back as "
            "it was, and resume with --resume"
        )

    def whole(self, name: str, like: Tensor) -> Tensor:
        return self.block(name, (slice(None),) * like.ndim, like)


def _read(path: Path, name: str, index: Index, like: Tensor) -> Tensor:
    """A block of a tensor in a file, as the model would hold it; the file is mapped for no longer than that."""
    with safe_open(path, framework="pt") as file:
        block: Tensor = file.get_slice(name)[index]
    return block.to(like.dtype).to(like.device)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _tensors_in(source: str | Path | None) -> dict[str, Path]:
    """Names of the tensors in a model's folder, on this machine, to their files."""
    if source is None:
        return {}
    folder = Path(source).expanduser()
    if not folder.exists():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(str(source), "config.json")
        except HFValidationError:
            return {}
        if not isinstance(found, str):
            return {}
        folder = Path(found).parent
    tensors: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError):
            continue  # whatever it is, the model was not loaded from it
    return tensors


def blocks_of(shape: Sequence[int], *, by_columns: bool = False) -> Iterator[Index]:
    """Indices that cut a tensor into blocks of ``BLOCK`` elements at most, or of one row where a row is longer."""
    if len(shape) == 0:
        yield ()
        return
    outer, dim = shape[:-2], max(0, len(shape) - 2)
    along: Index = ()
    if by_columns:
        assert len(shape) == 2
        outer, dim, along = shape[:0], 1, (slice(None),)
    length = shape[dim]
    others = (shape[0] if by_columns else math.prod(shape[dim + 1 :])) or 1
    size = max(1, BLOCK // others)
    for numbers in product(*(range(n) for n in outer)):
        for first in range(0, length, size):
            yield (*(slice(i, i + 1) for i in numbers), *along, slice(first, min(first + size, length)))
