"""Tensors that lie in shards among processes, written to safetensors files by all of them and read by as many as there are.

The work is done by ``torch.distributed.checkpoint`` in its safetensors form; its usual form is pickled.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lisatune.processes.collectives import barrier, rank
from lisatune.processes.tensors import whole


def shard_name(name: str) -> str:
    """The file of this process for what is called ``name``."""
    return f"{name}-rank{rank()}"


def without_rank(name: str) -> str:
    """What a file is called without the process that wrote it.

    Example:
        >>> without_rank("weights-layers.0-rank3"), without_rank("weights-norm")
        ('weights-layers.0', 'weights-norm')
    """
    return re.sub(r"-rank\d+$", "", name)


def write_shards(folder: Path, files: Mapping[str, Mapping[str, Tensor]]) -> list[Path]:
    """Each process writes what it holds of ``files``, names to named tensors, to ``<name>-rank<its number>.safetensors``.

    Args:
        folder: One that all processes see, and that is there.
        files: The same names everywhere; a plain tensor is equal everywhere too, and is written by one of them.
    Returns: The files of this process, which have been written, but not flushed to the disk.
    """
    numbers = {tensor: i for i, tensors in enumerate(files.values(), start=1) for tensor in tensors}
    everything = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
    with _quiet():
        save(everything, storage_writer=HuggingFaceStorageWriter(str(folder), numbers, save_distributed=True))
    written = []
    for number, name in enumerate(files, start=1):
        made = folder / f"shard-{rank() + 1:05d}-model-{number:05d}-of-{len(files):05d}.safetensors"
        if made.exists():  # some processes hold nothing of a small tensor
            written.append(made.rename(folder / f"{shard_name(name)}.safetensors"))
    return written


class Shards:
    """The tensors of all safetensors files in ``folder``, whoever wrote them, in pieces or whole.

    Raises: SafetensorError or OSError if they cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._reader = HuggingFaceStorageReader(str(folder))
        found = self._reader.read_metadata().state_dict_metadata
        tensors = {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}
        self.shapes = {name: entry.size for name, entry in tensors.items()}
        self.dtypes = {name: entry.properties.dtype for name, entry in tensors.items()}

    def read(self, into: dict[str, Tensor]) -> None:
        """Copy tensors into those given by name, which may be shards; all processes ask for the same."""
        with _quiet():
            load(dict(into), storage_reader=self._reader)


def write_whole_files(folder: Path, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write tensors that lie in shards as the plain safetensors of a Hugging Face folder, one file for each of ``files``.

    Each process writes its shards, then one puts the pieces together on the disk: nowhere is more than a shard in memory.
    It takes twice the room while it lasts.
    """
    numbers = {tensor: i for i, tensors in enumerate(files.values(), start=1) for tensor in tensors}
    everything = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
    writer = HuggingFaceStorageWriter(str(folder), numbers, save_distributed=True, enable_consolidation=True)
    with _quiet():
        save(everything, storage_writer=writer)
    if rank() == 0:
        shutil.rmtree(folder / "sharded")
    barrier()


def write_converted_files(
    folder: Path, files: Mapping[str, Mapping[str, Tensor]], convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    """``write_whole_files`` for tensors that ``convert`` gives other names and shapes, those of one file at a time.

    Every process gathers the tensors of a file, and one writes them.
    """
    places: dict[str, str] = {}
    size = 0
    for number, tensors in enumerate(files.values(), start=1):
        gathered = {name: whole(tensor) for name, tensor in tensors.items()}
        if rank() > 0:
            continue
        made = {name: tensor.cpu().contiguous() for name, tensor in convert(gathered).items()}
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(made, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(made, file)
        size += sum(tensor.nbytes for tensor in made.values())
    if rank() == 0:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    barrier()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes that PyTorch writes on every call."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
