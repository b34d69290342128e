"""The samplers by name, made from plain arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

from lisatune.errors import UserError, did_you_mean
from lisatune.samplers.base import SamplerWithChances
from lisatune.samplers.bernoulli import BernoulliSampler
from lisatune.samplers.draws import check_counts
from lisatune.samplers.fixed import FixedSampler
from lisatune.samplers.gradient_norm import GradientNormSampler
from lisatune.samplers.round_robin import RoundRobinSampler
from lisatune.samplers.sweep import SweepSampler
from lisatune.samplers.uniform import UniformSampler
from lisatune.samplers.weighted import WeightedSampler, parse_weights, read_weights


def make_sampler(
    name: str, *, num_layers: int, num_active: int, interval_steps: int = 20, seed: int = 0, **options: Any
) -> SamplerWithChances:
    """The sampler called ``name``, from what all have in common and its own options.

    ================= ================================================================================================
    ``uniform``       no options
    ``bernoulli``     ``probabilities``, one for each layer; without, num_active / num_layers for each
    ``sweep``         no options
    ``round_robin``   ``descending``; ``seed`` has no part in it
    ``fixed``         ``layers``, and ``num_active`` has no part in it; without, ``num_active`` drawn once by ``seed``
    ``weighted``      ``weights``: a list, an object from names ("layers.0") to weights, or the path of a JSON file with
                      one of them; ``names``, if the layers are called otherwise: ``layers.pool()``
    ``gradient_norm`` ``temperature``, ``exploration``, ``smoothing``, ``refresh_intervals``
    ================= ================================================================================================

    Raises: UserError for a name or an option that there is not, and what the sampler itself refuses.
    Example:
        >>> make_sampler("round_robin", num_layers=4, num_active=1, descending=True)
        RoundRobinSampler(num_layers=4, num_active=1, descending=True)
        >>> make_sampler("swep", num_layers=4, num_active=1)
        Traceback (most recent call last):
        lisatune.errors.UserError: there is no sampler 'swep'; did you mean 'sweep'?
    """
    if name not in SAMPLERS:
        hint = did_you_mean(name, SAMPLERS) or f": choose one of {', '.join(SAMPLERS)}"
        raise UserError(f"there is no sampler '{name}'{hint}")
    maker = SAMPLERS[name]
    known = [p.name for p in inspect.signature(maker).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known) or f": it has {', '.join(known) or 'no options'}"
            raise UserError(f"sampler {name} has no option '{option}'{hint}")
    try:
        return maker(num_layers, num_active, interval_steps, seed, **options)
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, OSError) as error:
        # an option of another kind, from a file of settings
        raise UserError(f"sampler {name} cannot be made with these options ({error}): see what it takes") from error


def _uniform(num_layers: int, num_active: int, interval_steps: int, seed: int) -> UniformSampler:
    return UniformSampler(num_layers, num_active, seed)


def _bernoulli(
    num_layers: int, num_active: int, interval_steps: int, seed: int, *, probabilities: Iterable[float] | None = None
) -> BernoulliSampler:
    check_counts(num_layers, num_active)
    chance = num_active / num_layers if probabilities is None else tuple(probabilities)
    return BernoulliSampler(num_layers, chance, seed)


def _sweep(num_layers: int, num_active: int, interval_steps: int, seed: int) -> SweepSampler:
    return SweepSampler(num_layers, num_active, seed)


def _round_robin(
    num_layers: int, num_active: int, interval_steps: int, seed: int, *, descending: bool = False
) -> RoundRobinSampler:
    return RoundRobinSampler(num_layers, num_active, descending)


def _fixed(
    num_layers: int, num_active: int, interval_steps: int, seed: int, *, layers: Iterable[int] | None = None
) -> FixedSampler:
    drawn = UniformSampler(num_layers, num_active, seed)(0) if layers is None else tuple(layers)
    return FixedSampler(num_layers, drawn)


def _weighted(
    num_layers: int, num_active: int, interval_steps: int, seed: int, *,
    weights: str | PathLike[str] | Mapping[str, float] | Iterable[float] | None = None,
    names: Sequence[str] | None = None,
) -> WeightedSampler:  # fmt: skip
    if weights is None:
        raise UserError("sampler weighted needs weights: a list, or the path of a JSON file")
    if isinstance(weights, str | PathLike):
        return WeightedSampler(num_layers, num_active, read_weights(weights, num_layers, names), seed)
    return WeightedSampler(num_layers, num_active, parse_weights(weights, num_layers, names), seed)


def _gradient_norm(
    num_layers: int, num_active: int, interval_steps: int, seed: int, *,
    temperature: float = 1.0, exploration: float = 0.1, smoothing: float = 0.5, refresh_intervals: int = 1,
) -> GradientNormSampler:  # fmt: skip
    return GradientNormSampler(
        num_layers, num_active, interval_steps, seed,
        temperature=temperature, exploration=exploration, smoothing=smoothing, refresh_intervals=refresh_intervals,
    )  # fmt: skip


SAMPLERS: dict[str, Callable[..., SamplerWithChances]] = {
    "uniform": _uniform,
    "bernoulli": _bernoulli,
    "sweep": _sweep,
    "round_robin": _round_robin,
    "fixed": _fixed,
    "weighted": _weighted,
    "gradient_norm": _gradient_norm,
}
