"""What changes from step to step, as pure functions of the step: the learning rate and the random state."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable

import torch

from lisatune.errors import UserError
from lisatune.processes.collectives import rank
from lisatune.settings import TrainConfig


def make_schedule(config: TrainConfig, num_steps: int) -> Callable[[int], float]:
    """The learning rate of each optimizer step (from 0): transformers' schedule, as a pure function of the step.

    ``constant`` warms up too, if a warm-up is asked for; transformers would leave it out.

    Raises: UserError if transformers refuses an argument.
    Example:
        >>> from lisatune.settings import build_config
        >>> config = build_config({"model": "m", "data": "d", "output": "o", "learning_rate": 1.0, "warmup_steps": 2})
        >>> rate_at = make_schedule(config, num_steps=6)
        >>> [rate_at(step) for step in range(6)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
    """
    from transformers import get_scheduler

    name, arguments = config.lr_scheduler_type, config.lr_scheduler_kwargs
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * num_steps)
    holder = torch.optim.SGD([torch.zeros(1)], lr=config.peak_rate)  # a schedule asks it for its rate alone
    try:
        scheduler = get_scheduler(
            "constant_with_warmup" if name == "constant" else name, holder, warmup, num_steps, dict(arguments)
        )
        factor = scheduler.lr_lambdas[0]
        for step in (0, warmup, num_steps // 2, num_steps - 1):  # an argument of a wrong kind fails here
            float(factor(step))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"lr_scheduler_kwargs={arguments} does not fit lr_scheduler_type={name}: {error}") from error
    return lambda step: float(config.peak_rate * factor(step))


def check_schedule(config: TrainConfig) -> None:
    """Refuse an argument of the schedule before the model is loaded, which may settle the learning rate."""
    make_schedule(config.model_copy(update={"learning_rate": config.learning_rate or 1e-4}), config.max_steps or 1000)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of a step; a switch of layers does not touch it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)


def seed_step(seed: int, step: int) -> None:
    """Seed what a step draws at random (dropout), so that it depends on the seed and the step alone."""
    name = f"{seed}/{step}" + (f"/{rank()}" if rank() else "")  # rows of other processes are dropped out otherwise
    number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    random.seed(number)
    torch.manual_seed(number)
