"""What a task of TRL is: its trainer, the model that it trains, and what a step of it holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from lisatune.errors import missing_package


@dataclass(frozen=True)
class Answer:
    """An answer after its prompt, in tokens.

    Args:
        name: ``chosen``, ``rejected`` or ``completion``.
        ids: The tokens of both, before anything is cut.
        num_prompt: How many of them are the prompt.
        whole_prompt: Whether a prompt stays whole that is longer than ``max_length``.
    """

    name: str
    ids: list[int]
    num_prompt: int
    whole_prompt: bool = False


@dataclass(kw_only=True)
class Task(ABC):
    """One way to learn from judged answers. The fields are settings.

    Another task is a subclass in a file of its own, and a line in ``TASKS``.

    Attributes:
        trainer: TRL's trainer, as ``MODULE:NAME``.
        arguments: The class of its arguments, in the same module.
        auto_class: The class of transformers that loads the model.
        model_options: What that class is given.
        writes_text: Whether the trained model writes text; otherwise it gives a score.
    """

    trainer: ClassVar[str]
    arguments: ClassVar[str]
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    model_options: ClassVar[dict[str, Any]] = {}
    writes_text: ClassVar[bool] = True

    def classes(self) -> tuple[type, type]:
        """TRL's trainer and the class of its arguments.

        Raises: MissingPackageError without TRL.
        """
        module, _, name = self.trainer.partition(":")
        with trl_at_hand(f"task={type(self).__name__.lower()}"):
            found = import_module(module)
            return getattr(found, name), getattr(found, self.arguments)

    def options(self) -> dict[str, Any]:
        """More arguments of the trainer than all tasks have."""
        return {}

    @property
    def needs_reference(self) -> bool:
        """Whether another copy of the model is held, the one that training began with."""
        return False

    @abstractmethod
    def step_loss(self, model: Any, reference: Any, rows: int, tokens: int) -> Tensor:
        """A loss that holds on the meta device what TRL's holds of a micro-batch; its value means nothing.

        Args:
            model: The model, on meta.
            reference: The reference model; None if the model is its own, or none is needed.
            rows: Rows of the data.
            tokens: Tokens of the longest.
        """

    @abstractmethod
    def answers(self, row: Mapping[str, Any]) -> list[Answer]:
        """What is in a row of TRL's own data set, which holds tokens."""

    def why_left_out(self, answers: Sequence[Answer], max_length: int) -> str:
        """Why TRL leaves a row with these answers out; empty if it does not."""
        return ""


@contextmanager
def trl_at_hand(feature: str) -> Iterator[None]:
    """Say what to install if TRL, or what it needs, is not there."""
    try:
        yield
    except ImportError as error:
        raise missing_package("trl", feature, "sft") from error


def meta_ids(rows: int, tokens: int) -> Tensor:
    """Tokens without values."""
    return torch.empty(rows, tokens, dtype=torch.int64, device="meta")


def without_adapters(model: Any) -> Any:
    """The model inside of peft's."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def log_probs(model: Any, rows: int, tokens: int) -> Tensor:
    """Log-probability of each row, as TRL's fused head computes it: without the logits of all tokens."""
    from trl.trainer.utils import add_fused_lm_head

    inner = without_adapters(model)
    if "forward" not in vars(inner):
        add_fused_lm_head(inner, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    ids = meta_ids(rows, tokens)
    found: Tensor = model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True).log_probs
    return found.sum(1)


@contextmanager
def kernels_on_meta(device: str, mixed: bool = False) -> Iterator[None]:
    """Inside, TRL's fused head holds on meta what it holds on ``device``: on a GPU its kernels work in place; ``mixed``: under autocast."""
    with trl_at_hand("a forecast of a preference task"):
        from trl.kernels import chunked_logprob

    def nothing(*_args: Any, **_kwargs: Any) -> None:
        pass

    in_place = ("_forward_tile", "_backward_tile", "_addmm_fp32") if device == "cuda" else ()
    asked, dtype_of = torch.is_autocast_enabled, torch.get_autocast_dtype
    # PyTorch knows no such setting of the meta device, and raises
    settings: dict[str, Callable[..., Any]] = {
        "is_autocast_enabled": lambda *kind: mixed if kind == ("meta",) else asked(*kind),
        "get_autocast_dtype": lambda kind: torch.bfloat16 if kind == "meta" else dtype_of(kind),
    }
    with swapped(chunked_logprob, **dict.fromkeys(in_place, nothing)), swapped(torch, **settings):
        yield


@contextmanager
def swapped(module: ModuleType, **functions: Callable[..., Any]) -> Iterator[None]:
    """Inside, ``module`` has ``functions`` in place of its own."""
    before = {name: getattr(module, name) for name in functions}
    vars(module).update(functions)
    try:
        yield
    finally:
        vars(module).update(before)
