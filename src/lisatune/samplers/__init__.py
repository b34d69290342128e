"""The samplers by name. A new one is a file here, and a line in ``SAMPLERS``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from typing import Any

from lisatune.errors import UserError, did_you_mean
from lisatune.samplers.base import Sampler
from lisatune.samplers.bernoulli import BernoulliSampler
from lisatune.samplers.fixed import FixedSampler
from lisatune.samplers.gradient_norm import GradientNormSampler
from lisatune.samplers.round_robin import RoundRobinSampler
from lisatune.samplers.sweep import SweepSampler
from lisatune.samplers.uniform import UniformSampler
from lisatune.samplers.weighted import WeightedSampler

SAMPLERS: dict[str, type[Sampler]] = {
    "uniform": UniformSampler,
    "bernoulli": BernoulliSampler,
    "sweep": SweepSampler,
    "round_robin": RoundRobinSampler,
    "fixed": FixedSampler,
    "weighted": WeightedSampler,
    "gradient_norm": GradientNormSampler,
}

# fields that are filled in for all samplers; the others are options
COMMON = ("num_layers", "num_active", "interval_steps", "seed", "names")


def make_sampler(
    name: str, *, num_layers: int, num_active: int, interval_steps: int = 20, seed: int = 0,
    names: Sequence[str] | None = None, **options: Any,
) -> Sampler:  # fmt: skip
    """The sampler called ``name``, from what all have in common and its own options.

    Options are the fields of its class. ``MODULE:CLASS`` is a class of your own, see ``Sampler``.

    Args:
        name: One of ``SAMPLERS``, or ``MODULE:CLASS``.
        num_layers: How many layers there are to draw from.
        num_active: How many are drawn for an interval.
        interval_steps: Optimizer steps of an interval.
        seed: Seed of the draws.
        names: What the layers are called: ``layers.pool()``.
        options: The sampler's own.
    Raises: UserError for a name or an option that there is not, and what the sampler itself refuses.
    Example:
        >>> make_sampler("round_robin", num_layers=4, num_active=1, descending=True)
        RoundRobinSampler(num_layers=4, num_active=1, descending=True)
        >>> make_sampler("swep", num_layers=4, num_active=1)
        Traceback (most recent call last):
        lisatune.errors.UserError: there is no sampler 'swep'; did you mean 'sweep'?
    """
    check_options(name, options)
    kind = find_sampler(name)
    taken = {field.name for field in fields(kind) if field.init}  # type: ignore[arg-type]
    common = dict(zip(COMMON, (num_layers, num_active, interval_steps, seed, names), strict=True))
    try:
        return kind(**{name: value for name, value in common.items() if name in taken}, **options)
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, OSError) as error:
        # an option of another kind, from a file of settings
        raise UserError(
            f"sampler {name} cannot be made with these options ({error}): give the options of its class"
        ) from error


def find_sampler(name: str) -> type[Sampler]:
    """The class of the sampler called ``name``: one of ``SAMPLERS``, or your own as ``MODULE:CLASS``.

    Raises: UserError if there is none.
    """
    if name in SAMPLERS:
        return SAMPLERS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        hint = did_you_mean(name, SAMPLERS) or f": choose one of {', '.join(SAMPLERS)}"
        raise UserError(f"there is no sampler '{name}'{hint}")
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:  # whatever the module's own code does
        raise UserError(
            f"sampler {name} cannot be imported ({error}): install its package, or set PYTHONPATH to its folder"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Sampler) and is_dataclass(found)):
        raise UserError(f"sampler {name} is not a sampler: write a dataclass that inherits from lisatune.Sampler")
    return found


def check_options(name: str, options: Iterable[str]) -> None:
    """Refuse options that the sampler called ``name`` does not have, or that it needs and are not given.

    Raises: UserError naming the first.
    """
    known = {field.name: field for field in fields(find_sampler(name)) if field.init and field.name not in COMMON}  # type: ignore[arg-type]
    for option in options:
        if option in (*COMMON, "name"):
            raise UserError(
                f"sampler_options: {option} is not an option, but a setting: write it outside sampler_options, or leave it out"
            )
        if option not in known:
            hint = did_you_mean(str(option), known) or f": it has {', '.join(known) or 'no options'}"
            raise UserError(f"sampler {name} has no option '{option}'{hint}")
    for option, field in known.items():
        if option not in options and field.default is MISSING and field.default_factory is MISSING:
            what = f": {field.metadata['needs']}" if "needs" in field.metadata else ""
            raise UserError(f"sampler {name} needs {option}{what}")
