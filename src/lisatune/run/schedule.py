"""What changes from step to step, as pure functions of the step: the learning rate and the random state."""

from __future__ import annotations

import hashlib
import math
import random

import torch

from lisatune.processes.collectives import rank
from lisatune.settings import TrainConfig


def learning_rate_at(config: TrainConfig, step: int, num_steps: int) -> float:
    """The learning rate of optimizer step ``step`` (from 0): transformers' schedules, as a pure function.

    Example:
        >>> from lisatune.settings import build_config
        >>> config = build_config({"model": "m", "data": "d", "output": "o", "learning_rate": 1.0, "warmup_steps": 2})
        >>> [learning_rate_at(config, step, num_steps=6) for step in range(6)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]
    """
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.learning_rate * max(0.0, factor[config.lr_scheduler_type])


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, num_steps: int) -> float:
    """Set and return the learning rate of ``step``; a switch of layers does not touch it."""
    rate = learning_rate_at(config, step, num_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)
    return rate


def seed_step(seed: int, step: int) -> None:
    """Seed what a step draws at random (dropout), so that it depends on the seed and the step alone."""
    name = f"{seed}/{step}" + (f"/{rank()}" if rank() else "")  # rows of other processes are dropped out otherwise
    number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    random.seed(number)
    torch.manual_seed(number)
