"""The settings of ``LisaCallback``, checked, kept in the Trainer's checkpoint, and made into an engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import nn

from lisatune.engine import LisaEngine, StatePolicy
from lisatune.errors import UserError
from lisatune.layers import Trains, find_layers
from lisatune.memory.blocks import SliceOf
from lisatune.methods import UNITS
from lisatune.pieces import split_layers
from lisatune.samplers import make_sampler
from lisatune.samplers.draws import check_num_active
from lisatune.slices.engine import SliceEngine, usual_num_slices


@dataclass(frozen=True)
class LisaSettings:
    """What a user may set; see ``LisaCallback``."""

    num_active: int = 2
    interval_steps: int = 20
    seed: int = 0
    state_policy: StatePolicy = "reset_layers"
    decoder_name: str | None = None
    train_embedding: Trains = True
    train_head: Trains = True
    sampler: str = "uniform"
    sampler_options: dict[str, Any] = field(default_factory=dict)
    sampled_unit: str = "layers"
    num_slices: int | None = None
    train_norms: Trains = False
    slices_of: SliceOf = "rows"
    train_outside: bool = False

    def __post_init__(self) -> None:
        if self.num_active < 1:
            raise UserError("num_active is 0, so no decoder layer would ever train: choose at least 1")
        if self.interval_steps < 1:
            raise UserError(f"interval_steps is {self.interval_steps}: choose at least 1")
        if self.sampled_unit not in ENGINES:
            raise UserError(f"sampled_unit is '{self.sampled_unit}': choose one of {', '.join(ENGINES)}")

    @classmethod
    def usual(cls, **given: Any) -> LisaSettings:
        """``given``, without what is None; what is left out is as usual for the unit that is sampled."""
        given = {name: value for name, value in given.items() if value is not None}
        unit = UNITS.get(given.get("sampled_unit", "layers"))
        preset = unit.preset if unit else {}
        # the learning rate is the Trainer's, and so is the optimizer, which is fused by default: rows suit any
        own = {field.name for field in fields(cls)} - {"slices_of"}
        return cls(**{**{name: value for name, value in preset.items() if name in own}, **given})

    def engine(self, model: nn.Module) -> LisaEngine | SliceEngine:
        """LISA for ``model``."""
        return ENGINES[self.sampled_unit](self, model)

    def as_saved(self) -> dict[str, Any]:
        """What a checkpoint keeps; plain values, as JSON gives them back."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    def check_saved(self, saved: dict[str, Any]) -> None:
        """Refuse to go on from a checkpoint that was made with other settings.

        Raises: UserError naming the first that differs, and both values.
        """
        for name, now in self.as_saved().items():
            before = saved.get(name, now)
            if before != now:
                raise UserError(
                    f"the checkpoint was made with {name}={before}, but LisaCallback has {name}={now}: set "
                    f"{name}={before} to resume, or train without resume_from_checkpoint"
                )


def layer_engine(settings: LisaSettings, model: nn.Module) -> LisaEngine:
    """Whole decoder layers, or pieces of them."""
    layers: Any = find_layers(model, settings.decoder_name)
    if settings.sampled_unit != "layers":
        layers = split_layers(layers, settings.sampled_unit)  # type: ignore[arg-type]
    trains = {"train_embedding": settings.train_embedding, "train_head": settings.train_head}
    pool = layers.pool(**trains)
    unit = "decoder layers" if settings.sampled_unit == "layers" else settings.sampled_unit
    check_num_active(settings.num_active, len(pool), unit=unit)
    sampler = make_sampler(
        settings.sampler, num_layers=len(pool), num_active=settings.num_active, seed=settings.seed,
        interval_steps=settings.interval_steps, names=pool, **settings.sampler_options,
    )  # fmt: skip
    return LisaEngine(
        layers, sampler, settings.interval_steps, settings.state_policy, **trains, train_outside=settings.train_outside
    )


def slice_engine(settings: LisaSettings, model: nn.Module) -> SliceEngine:
    """Blocks of rows or columns of every matrix."""
    layers = find_layers(model, settings.decoder_name)
    num_slices = settings.num_slices or usual_num_slices(len(layers.decoder))
    check_num_active(settings.num_active, num_slices, unit="slices")
    sampler = make_sampler(
        settings.sampler, num_layers=num_slices, num_active=settings.num_active, seed=settings.seed,
        interval_steps=settings.interval_steps, **settings.sampler_options,
    )  # fmt: skip
    return SliceEngine(
        layers, sampler, settings.interval_steps, settings.state_policy,
        train_embedding=settings.train_embedding, train_head=settings.train_head, train_norms=settings.train_norms,
        slices_of=settings.slices_of,
    )  # fmt: skip


ENGINES: dict[str, Callable[[LisaSettings, nn.Module], LisaEngine | SliceEngine]] = {
    "layers": layer_engine,
    "halves": layer_engine,
    "modules": layer_engine,
    "slices": slice_engine,
}
