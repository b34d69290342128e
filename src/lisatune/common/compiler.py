"""A compilation of PyTorch that fails, told in a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lisatune.errors import UserError


@contextmanager
def compiling(setting: str, device_type: str) -> Iterator[None]:
    """Tell a failure to compile inside as a mistake of ``setting``.

    Raises: UserError if there is no compiler, or it cannot compile what it is given.
    """
    try:
        yield
    except _failures() as error:
        need = "a C++ compiler (g++)" if device_type == "cpu" else "Triton"
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{setting}=true: {need} is missing or fails: install it, or leave {setting} out ({reason})"
        ) from error


def _failures() -> tuple[type[Exception], ...]:
    """What a compilation that fails raises. Importing them takes 2 s, so it waits until they are needed."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return TorchDynamoException, InductorError
