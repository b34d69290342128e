"""Processes that are not there, for a forecast: FSDP2's own code on the meta device, whose messages go to nobody."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from lisatune.processes.collectives import FAKE


@contextmanager
def fake_processes(num_ranks: int) -> Iterator[None]:
    """Act as the first of ``num_ranks`` processes, whose models are on the meta device. Inside training, change nothing.

    Example:
        >>> with fake_processes(8):
        ...     dist.get_rank(), dist.get_world_size()
        (0, 8)
        >>> dist.is_initialized()
        False
    """
    if num_ranks == 1:
        yield
        return
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    _teach_meta()
    alone = not dist.is_initialized()
    if alone:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group(FAKE, store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        # FSDP2 refuses to compute on meta, where a model mostly is because somebody forgot to load it
        with patch.object(FSDPParamGroup, "_validate_no_meta_params", lambda _: None):
            yield
    finally:
        if alone:
            dist.destroy_process_group()


class _Stream(torch.cpu.Stream):
    """Work on meta is done as soon as it is asked for."""

    def record_event(self, event: Any = None) -> _Event:  # type: ignore[override]
        return _Event()


class _Event(torch.cpu.Event):
    def record(self, stream: Any = None) -> _Event:  # type: ignore[override]
        return self


def _teach_meta() -> None:
    """Give the meta device streams, and messages the shapes of what they bring."""
    import torch.distributed._tools.fake_collectives  # registers them, once

    if "torch.meta" in sys.modules:
        return
    module = ModuleType("torch.meta")
    module.__dict__.update({name: value for name, value in vars(torch.cpu).items() if not name.startswith("_")})
    stream = _Stream()
    module.__dict__.update(
        Stream=_Stream, Event=_Event, current_stream=lambda device=None: stream, current_device=lambda: 0
    )
    torch._register_device_module("meta", module)  # type: ignore[no-untyped-call]
