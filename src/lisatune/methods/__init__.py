"""What trains, and where its gradient comes from.

``METHODS`` is the list of methods. A new one is a file here and a line there.
"""

from __future__ import annotations

from lisatune.methods.base import Method
from lisatune.methods.full import Full
from lisatune.methods.lisa import Lisa
from lisatune.methods.lora import Lora
from lisatune.methods.mezo import Mezo
from lisatune.methods.slices import Slices

METHODS: dict[str, type[Method]] = {
    "lisa": Lisa,
    "fixed": Lisa,  # LISA's engine with other settings: ``PRESETS``
    "badam": Lisa,
    "lora": Lora,
    "full": Full,
    "mezo": Mezo,
}
UNITS: dict[str, type[Method]] = {"slices": Slices}  # of ``sampled_unit``: those that are more than other parts


def method_of(method: str, sampled_unit: str) -> type[Method]:
    """The class for two settings.

    Example:
        >>> method_of("badam", "layers").__name__, method_of("badam", "slices").__name__
        ('Lisa', 'Slices')
    """
    return UNITS.get(sampled_unit, METHODS[method])
