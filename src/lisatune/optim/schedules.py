"""The learning-rate schedules of transformers by name, with their arguments. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable

from lisatune.errors import UserError, did_you_mean

# name to arguments, as transformers has them; those of its schedules that are no functions of the step are left out
SCHEDULES: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "constant": (),
    "constant_with_warmup": (),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("min_lr", "min_lr_rate", "num_cycles"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate", "num_cycles", "warmup_lr_rate"),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": (
        "num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles",
    ),
}  # fmt: skip
ONE_OF = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}


def check_schedule(name: str, arguments: Iterable[str]) -> None:
    """Refuse arguments that the schedule ``name`` does not have, or that it needs and are not given.

    Raises: UserError naming the first.
    Example:
        >>> check_schedule("cosine_with_min_lr", {"min_lr": 1e-6})
        >>> check_schedule("linear", {"min_lr": 1e-6})
        Traceback (most recent call last):
        lisatune.errors.UserError: lr_scheduler_kwargs: linear takes no arguments, so leave 'min_lr' out
    """
    known, given = SCHEDULES[name], list(arguments)
    for argument in given:
        if argument not in known:
            hint = did_you_mean(str(argument), known)
            raise UserError(
                f"lr_scheduler_kwargs: {name} takes {', '.join(known) or 'no arguments'}, so leave '{argument}' out{hint}"
            )
    if needed := ONE_OF.get(name, ()):
        if not set(needed) & set(given):
            raise UserError(
                f"lr_scheduler_type={name} needs {' or '.join(needed)}: give lr_scheduler_kwargs={{{needed[0]}: ...}}"
            )
        if set(needed) <= set(given) and len(needed) > 1:
            raise UserError(f"lr_scheduler_kwargs: {name} takes {' or '.join(needed)}, not both")
