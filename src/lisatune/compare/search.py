"""Searched values that follow what earlier runs came to: optuna's, as a pure function of those runs. Needs no torch."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lisatune.errors import UserError, missing_package

MOST_ATTEMPTS = 50  # attempts to find values that were not tried yet
Tried = Sequence[tuple[Mapping[str, Any], float]]  # searched values, and the loss that they came to


def check_optuna(trials: Any) -> int:
    """The number of trials of ``search=optuna``.

    Raises: UserError if there is none, or optuna is not installed.
    """
    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 1:
        raise UserError("search=optuna needs the number of trials of each contender: give trials=30")
    if importlib.util.find_spec("optuna") is None:
        raise missing_package("optuna", "search=optuna", "optuna")
    return trials


def distribution(values: Sequence[Any]) -> Any:
    """Where optuna looks: between the least and the most of numbers, or among words.

    Numbers with a decimal point are searched by their logarithm, unless one is 0 or less.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        return CategoricalDistribution(tuple(values))
    low, high = min(values), max(values)
    if all(isinstance(value, int) for value in values):
        return IntDistribution(low, high)
    return FloatDistribution(low, high, log=low > 0)


def suggest(space: Mapping[str, Sequence[Any]], tried: Tried, name: str) -> dict[str, Any]:
    """Values to try next, after those in ``tried``.

    The same arguments give the same values, so a search that was stopped goes on as if it had not been.

    Args:
        space: Setting to its values; see ``distribution``.
        tried: What was tried, in order, with the loss it came to; not finite if it failed.
        name: Of the contender; each has draws of its own.
    Raises: UserError if nothing new is found.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    where = {setting: distribution(values) for setting, values in space.items()}
    before = [dict(values) for values, _ in tried]
    for attempt in range(MOST_ATTEMPTS):
        seed = hashlib.sha256(f"{name}/{len(tried)}/{attempt}".encode()).digest()[:4]
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=int.from_bytes(seed, "little")))
        study.add_trials([_trial(values, loss, where) for values, loss in tried])
        found = {setting: _short(value, where[setting]) for setting, value in study.ask(where).params.items()}
        if found not in before:
            return found
    raise UserError(
        f"{name}: nothing new is left to try after {len(tried)} trials: lower trials, or widen the range of {', '.join(space)}"
    )


def _trial(values: Mapping[str, Any], loss: float, where: Mapping[str, Any]) -> Any:
    from optuna.trial import TrialState, create_trial

    failed = not math.isfinite(loss)
    return create_trial(
        params=dict(values), distributions=dict(where), value=None if failed else loss,
        state=TrialState.FAIL if failed else TrialState.COMPLETE,
    )  # fmt: skip


def _short(value: Any, where: Any) -> Any:
    """A number in three digits, which are enough, and read better."""
    if not isinstance(value, float):
        return value
    return min(max(float(f"{value:.3g}"), where.low), where.high)
