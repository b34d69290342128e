"""A run that is asked to stop ends after its step, having saved; one that is asked twice ends at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopSignal:
    """``received`` is the number of the signal that asked the run to stop; 0 while none has."""

    received: int = 0

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        """The handler. Whatever is being written is beside the last whole checkpoint, so leaving at once is safe."""
        if self.received:
            os._exit(128 + number)
        self.received = number


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Note SIGINT and SIGTERM instead of dying of them; outside the main thread, where Python allows no handlers, do nothing.

    Example:
        >>> with stop_signals() as stop:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     stop.received == signal.SIGTERM
        True
    """
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in STOPPING}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
