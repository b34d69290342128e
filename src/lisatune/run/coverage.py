"""What a run's settings mean before its first step: how far each part moves, and what will never train."""

from __future__ import annotations

from collections.abc import Iterator

from lisatune.engine import LisaEngine
from lisatune.errors import UserError
from lisatune.learner import Learner
from lisatune.optim import OPTIMS
from lisatune.samplers.base import Sampler
from lisatune.samplers.fixed import FixedSampler
from lisatune.settings.config import TrainConfig
from lisatune.slices.engine import SliceEngine

UNKNOWN_TEXT = 5.5  # nats a token: at 6.2 spectral steps were far better; at 4.8 worse, at 1.5 no different
MANY_SLICES = 7  # with 15 of them, training the vocabulary whole helped; with 3 it did not
MOST_INTERVALS = 5000  # that are looked at; after so many a unit that had no turn has next to no chance


def describe_rate(asked: TrainConfig, config: TrainConfig) -> str | None:
    """The learning rate of ``config``, where ``asked`` has left it open."""
    usual = f"learning_rate={config.peak_rate:g}, which is usual for this method and model"
    return usual if asked.learning_rate is None else None


def describe_coverage(config: TrainConfig, learner: Learner, num_steps: int) -> list[str]:
    """Up to three lines: what is sampled, the effective rate of each part, and how many units never train in ``num_steps``.

    The effective rate is the learning rate times the share of steps in which a part trains: how far it moves, against full
    fine-tuning at that rate. Nothing is said where all parts train in every step at one rate.
    """
    shares = _shares(learner)
    if config.norm_lr_ratio == 1:
        shares.pop("norms", None)
    rates = {part: config.peak_rate * ratio for part, ratio in _ratios(config, learner).items() if part in shares}
    lines = [] if learner.engine is None else [_sampled(config, learner.engine)]
    if len(set(rates.values())) > 1 or min(shares.values(), default=1.0) < 1:
        described = [
            f"{part} {rates[part] * share:.2g}" + (f" ({rates[part]:.2g} in {100 * share:.2g}% of steps)" if share < 1 else "")
            for part, share in shares.items()
        ]  # fmt: skip
        lines.append(f"effective learning rates: {', '.join(described)}")
    if learner.engine is not None:
        lines += _untrained(config, learner.engine, num_steps)
    return lines


def hint_at_unknown_text(
    config: TrainConfig, engine: LisaEngine | SliceEngine | None, loss: float | None
) -> str | None:
    """What to try if slices train and the model hardly knows the text; ``loss`` is the held-out loss before training."""
    if not isinstance(engine, SliceEngine) or not (loss or 0) > UNKNOWN_TEXT:
        return None
    tries = [] if OPTIMS[config.optim].spectral else ["optim=spectral"]
    if engine.trains["embedding"] == "sampled" and len(engine.pool) > MANY_SLICES:
        tries.append("train_embedding=true train_head=true embedding_lr_ratio=0.3")
    if not tries:
        return None
    return (
        f"the model hardly knows this text (held-out loss {loss:.1f}), so much has to change: try {' and '.join(tries)}; "
        "lisatune compare tells what is better"
    )


def turns(sampler: Sampler, num_intervals: int) -> list[int] | None:
    """How often each unit is sampled, counted up to 2; None if that depends on what a sampler will learn.

    Example:
        >>> from lisatune.samplers.sweep import SweepSampler
        >>> turns(SweepSampler(num_layers=4, num_active=1), num_intervals=6)
        [1, 1, 2, 2]
    """
    if sampler.learns:
        return None
    counts = [0] * sampler.num_layers
    for interval in range(min(num_intervals, MOST_INTERVALS)):
        for unit in sampler(interval):
            counts[unit] = min(2, counts[unit] + 1)
        if min(counts) == 2:
            break
    return counts


def _units(config: TrainConfig) -> str:
    return {"layers": "decoder layers"}.get(config.sampled_unit, config.sampled_unit)


def _sampled(config: TrainConfig, engine: LisaEngine | SliceEngine) -> str:
    """What trains first, how it is sampled and for how long; and why it is this unit, where the settings left that open."""
    first = f"{len(engine.sampler(0))} of {engine.sampler.num_layers} {_units(config)}"
    each = " of each matrix" if config.sampled_unit == "slices" else ""
    steps = "every step" if engine.interval_steps == 1 else f"every {engine.interval_steps} steps"
    text = f"sampled: {first}{each}, {steps} ({config.sampler})"
    if config.method == "lisa" and config.recipe == "auto" and config.sampled_unit == "layers":
        text += "; set sampled_unit=slices for slices, which are the default where no setting of layers is given"
    return text


def _untrained(config: TrainConfig, engine: LisaEngine | SliceEngine, num_steps: int) -> Iterator[str]:
    if isinstance(engine.sampler, FixedSampler):
        return  # what never trains was asked for
    counts = turns(engine.sampler, -(-num_steps // engine.interval_steps))
    if counts is None or min(counts) == 2:
        return
    remedies = ["fewer interval_steps"] if engine.interval_steps > 1 else []
    remedies.append("a smaller num_slices" if config.sampled_unit == "slices" else "a larger num_active")
    remedies += [] if config.sampler == "sweep" else ["sampler=sweep"]
    remedy = " or ".join(remedies)
    never, once = counts.count(0), counts.count(1)
    told = ([f"{never} will never train"] if never else []) + (
        [f"{once} will train in one interval only"] if once else []
    )
    yield (
        f"{num_steps:,} steps are few for {len(counts)} {_units(config)}: {', and '.join(told)}"
        + (f"; {remedy} would reach them" if never else "")
    )


def _shares(learner: Learner) -> dict[str, float]:
    """Parts to the share of steps in which they train; those that never do are left out."""
    engine, layers = learner.engine, learner.layers
    if engine is None:
        return {part: 1.0 for part in ("layers", "embedding", "head", "norms") if _trains(learner, part)}
    try:
        inclusion = engine.sampler.inclusion(0)
    except UserError:  # a sampler of the user's own that does not say
        return {}
    mean = sum(inclusion) / len(inclusion)
    if isinstance(engine, SliceEngine):
        found = {"layers": mean} | {
            part: mean if kind == "sampled" else float(kind) for part, kind in engine.trains.items()
        }
    else:
        trains = {"embedding": engine.train_embedding, "head": engine.train_head}
        found = {"layers": mean} | {part: mean if kind == "sampled" else float(kind) for part, kind in trains.items()}
    if layers.tied or layers.head is None:
        found.pop("head")
    return {part: share for part, share in found.items() if share}


def _trains(learner: Learner, part: str) -> bool:
    parameters = learner.layers.parts()[{"layers": "layers.0", "norms": "norm"}.get(part, part)]
    return any(p.requires_grad for p in parameters.values())


def _ratios(config: TrainConfig, learner: Learner) -> dict[str, float]:
    embedding = config.embedding_lr_ratio
    head = config.head_lr_ratio or (embedding if learner.layers.tied else 1.0)
    return {"layers": 1.0, "embedding": embedding, "head": head, "norms": config.norm_lr_ratio}
