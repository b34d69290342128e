"""What trains, and where its gradient comes from.

``METHODS`` is the list of methods. A new one is a file here and a line there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lisatune.common.choice import Choice

if TYPE_CHECKING:
    from lisatune.methods.base import Method


@dataclass(frozen=True)
class MethodChoice(Choice):
    """A method, or a unit that LISA samples: a class, and the settings that are usual for it.

    Args:
        layerwise: It trains some parts of the model at a time, which a sampler draws.
        backward: Its gradients come from a backward pass.
        preset: Settings that it takes in place of the defaults; the user's own win.
    """

    layerwise: bool = False
    backward: bool = True
    preset: Mapping[str, Any] = field(default_factory=dict)


LISA = "lisatune.methods.lisa:Lisa"

METHODS: dict[str, MethodChoice] = {
    "lisa": MethodChoice(LISA, layerwise=True),
    "fixed": MethodChoice(LISA, layerwise=True, preset={"sampler": "fixed"}),
    "badam": MethodChoice(
        LISA, layerwise=True,
        preset={"sampler": "sweep", "num_active": 1, "train_embedding": False, "train_head": False},
    ),
    "lora": MethodChoice("lisatune.methods.lora:Lora"),
    "full": MethodChoice("lisatune.methods.full:Full"),
    "mezo": MethodChoice("lisatune.methods.mezo:Mezo", backward=False, whole=True),
}  # fmt: skip

# what a layerwise method samples
UNITS: dict[str, MethodChoice] = {
    "layers": MethodChoice(LISA),
    "halves": MethodChoice(LISA),
    "modules": MethodChoice(LISA),
    "slices": MethodChoice(
        "lisatune.methods.slices:Slices",
        preset={
            "sampler": "sweep", "num_active": 1, "interval_steps": 1, "train_embedding": "sampled", "train_head": "sampled",
            "slices_of": "columns",
        },
    ),
}  # fmt: skip

# LISA for whoever does not say what is sampled: the best that is known at its memory, and the paper's
RECIPES: dict[str, MethodChoice] = {
    "auto": MethodChoice(LISA, preset={"sampled_unit": "slices"}),
    "paper": MethodChoice(LISA),
}
# whoever gives one of these without a unit means the paper's layers
OF_LAYERS = (
    "num_active", "interval_steps", "sampler", "sampler_options", "state_policy", "inverse_chance", "frozen_learning_rate",
)  # fmt: skip


def usual_unit(given: Mapping[str, Any]) -> dict[str, Any]:
    """The unit that is sampled if the settings ``given`` leave it open, as a setting; empty if it is the default.

    Example:
        >>> usual_unit({}), usual_unit({"interval_steps": 20}), usual_unit({"recipe": "paper"}), usual_unit({"method": "badam"})
        ({'sampled_unit': 'slices'}, {}, {}, {})
    """
    recipe = given.get("recipe", "auto")
    other = given.get("method", "lisa") != "lisa" or given.get("task", "sft") != "sft"
    of_layers = other or any(name in given for name in OF_LAYERS)
    return {} if of_layers or not isinstance(recipe, str) else dict(RECIPES[recipe].preset if recipe in RECIPES else {})


def method_of(method: str, sampled_unit: str) -> type[Method]:
    """The class for two settings.

    Example:
        >>> method_of("badam", "layers").__name__, method_of("badam", "slices").__name__
        ('Lisa', 'Slices')
    """
    chosen = METHODS[method]
    kind: type[Method] = (UNITS[sampled_unit] if chosen.layerwise else chosen).load()
    return kind
