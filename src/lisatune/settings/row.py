"""A setting as one row: its default, its help, and everything that is true about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field
from pydantic_core.core_schema import CoreSchema, literal_schema


@dataclass(frozen=True)
class Row:
    """What is true about a setting; ``rules`` reads it, and nothing else knows.

    A condition is written as ``a=1``, ``a!=1``, ``a<=b`` or ``a`` (a is given and not false), joined by ``and`` and
    ``or``. ``a.learns`` asks what the choice ``a`` says about itself. The texts go on from the setting's name.

    Args:
        methods: The methods in which the setting plays a part; empty for all.
        tasks: The tasks in which it plays a part; empty for all.
        optims: The optimizers in which it plays a part; empty for all.
        only_with: It plays a part only under this condition. The text refuses it where it is given without effect.
        needs: Conditions that must hold once it is set, each with the text of the refusal.
        never_with: Conditions that must not hold once it is set, each with a reason, or with a reason and a remedy.
        idle_with: Conditions under which it would have no effect, each with a reason.
        gpu: Why it has no effect on a CPU; empty if it has one.
        whole: True if each of several processes has to hold all weights whole; or the values with which it has to.
        free: A resumed run may change it, because it changes no weight beyond rounding.
        one_value: Runs can only be compared within one value of it.
        place: It names a place, which each host may have elsewhere; the content is compared instead.
        ladder: Where the planner pulls it; the lower, the less time it costs. None: the planner leaves it alone.
        pulled: The value to which the planner sets it; None if the planner finds the value.
        choices: Finds what a choice says about itself, by its name: ``whole``, and what conditions ask for.
        was: Its name in an earlier version, which is still understood.
    """

    methods: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    optims: tuple[str, ...] = ()
    only_with: Mapping[str, str] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)
    never_with: Mapping[str, str] = field(default_factory=dict)
    idle_with: Mapping[str, str] = field(default_factory=dict)
    gpu: str = ""
    whole: bool | tuple[str, ...] = False
    free: bool = False
    one_value: bool = False
    place: bool = False
    ladder: int | None = None
    pulled: Any = True
    choices: Callable[[str], Any] | None = None
    was: str = ""

    def __call__(self, schema: dict[str, Any]) -> None:
        """Leave the JSON schema as it is; pydantic keeps whatever is called with it next to the field."""


COLUMNS = tuple(Row.__dataclass_fields__)


def row(default: Any, help: str, **columns: Any) -> Any:
    """A field of the settings: ``...`` as default if it has none, columns of ``Row``, and limits such as ``ge=1``.

    Example:
        >>> from pydantic import BaseModel
        >>> class Settings(BaseModel):
        ...     seed: int = row(0, "Seed of everything.", ge=0, free=True)
        >>> field = Settings.model_fields["seed"]
        >>> field.default, field.description, row_of(field).free
        (0, 'Seed of everything.', True)
    """
    truths = {name: columns.pop(name) for name in COLUMNS if name in columns}
    return Field(default, description=help, json_schema_extra=Row(**truths), **columns)


class OneOf:
    """For ``Annotated[str, OneOf(registry)]``: a name in ``registry``, checked as a ``Literal`` of its names would be."""

    def __init__(self, registry: Iterable[str]) -> None:
        self.names = list(registry)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return literal_schema(self.names)


def row_of(field: Any) -> Row:
    """The row of a field of the settings."""
    found = field.json_schema_extra
    assert isinstance(found, Row), "a setting is made by row()"
    return found
