"""Layers drawn by weights that were given beforehand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from lisatune.errors import UserError, did_you_mean
from lisatune.samplers.base import Sampler
from lisatune.samplers.draws import check_counts, draw_by_weights, hashed, inclusion_by_weights


@dataclass(frozen=True)
class WeightedSampler(Sampler):
    """Draw ``num_active`` layers one after another, each time by weight among those that are left.

    With equal weights it draws what ``UniformSampler`` draws, layer for layer. The chance to be active grows more
    slowly than the weight, since a layer is drawn once at most: ``inclusion`` tells it.

    Args:
        num_layers: Decoder layers of the model (N_L), at least 1.
        num_active: Layers drawn for each interval (gamma), at most as many as have a weight above 0.
        weights: One for each layer, in any unit; a layer of weight 0 never trains. A tuple, or what ``parse_weights``
            or ``read_weights`` takes: a list, an object from names to weights, or the path of a JSON file.
        seed: Any integer; another seed gives other draws.
        names: What the layers are called in an object: ``layers.pool()``. Default: layers.0, layers.1, ...
    Raises: UserError for another number of weights than layers, for a weight that is negative or not finite, and if
        fewer than ``num_active`` are above 0.
    Reference: The paper's p(l), arXiv:2403.17919; Li et al., OWS, arXiv:2405.18380, which draws by
        ``scores.outlier_scores``; ``lisatune score-layers`` writes the file.
    Example:
        >>> sampler = WeightedSampler(num_layers=4, num_active=2, weights=(0.0, 1.0, 1.0, 8.0), seed=0)
        >>> [sampler(interval) for interval in range(3)]
        [(2, 3), (2, 3), (2, 3)]
        >>> [round(chance, 2) for chance in sampler.inclusion(interval=0)]
        [0.0, 0.51, 0.51, 0.98]
    """

    num_layers: int
    num_active: int
    weights: tuple[float, ...] = field(metadata={"needs": "a list, or the path of a JSON file"})
    seed: int = 0
    names: Sequence[str] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        given: Any = self.weights
        if not isinstance(given, tuple):
            read = read_weights if isinstance(given, str | PathLike) else parse_weights
            object.__setattr__(self, "weights", read(given, self.num_layers, self.names))
        check_counts(self.num_layers, self.num_active)
        if len(self.weights) != self.num_layers:
            raise UserError(f"{len(self.weights)} weights were given for {self.num_layers} layers: give one for each")
        for layer, weight in enumerate(self.weights):
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(f"the weight of layer {layer} is {weight}: give a number from 0 up")
        num_positive = sum(weight > 0 for weight in self.weights)
        if num_positive < self.num_active:
            raise UserError(
                f"num_active is {self.num_active}, but only {num_positive} of {self.num_layers} layers have a weight "
                "above 0: lower num_active, or give more layers a weight"
            )

    def __call__(self, interval: int) -> tuple[int, ...]:
        """The layers of interval number ``interval``, ascending; costs one hash a layer."""
        hashes = [hashed(self.seed, interval, layer) for layer in range(self.num_layers)]
        return draw_by_weights(self.weights, self.num_active, hashes)

    def inclusion(self, interval: int) -> tuple[float, ...]:
        """The chance of each layer to be drawn, as ``inclusion_by_weights`` computes it; kept after the first time."""
        return inclusion_by_weights(self.weights, self.num_active)


def read_weights(path: str | PathLike[str], num_layers: int, names: Sequence[str] | None = None) -> tuple[float, ...]:
    """Weights from a JSON file: a list with one for each layer, or an object from names to weights.

    Args:
        path: Path of a file with, for example, ``[1.0, 0.5]`` or ``{"layers.0": 1.0, "layers.1": 0.5}``.
        num_layers: How many there must be.
        names: What the layers are called in an object: ``layers.pool()``. Default: layers.0, layers.1, ...
    Raises: UserError if the file is absent or not of that form, if a weight is missing, superfluous, negative, not a
        finite number, or if all are 0.
    Example:
        >>> path = getfixture("tmp_path") / "weights.json"
        >>> _ = path.write_text('{"layers.1": 0.5, "layers.0": 1}')
        >>> read_weights(path, num_layers=2)
        (1.0, 0.5)
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the weights cannot be read from {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"the weights in {path} are not valid JSON: {error}") from error
    if not isinstance(content, list | dict):
        raise UserError(f'{path} holds {content!r}: give a list of weights, or an object such as {{"layers.0": 1.0}}')
    try:
        return parse_weights(content, num_layers, names)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def parse_weights(
    weights: Mapping[str, Any] | Iterable[Any], num_layers: int, names: Sequence[str] | None = None
) -> tuple[float, ...]:
    """Weights in the order of the layers; ``read_weights`` tells what is refused.

    Example:
        >>> parse_weights({"layers.1": 0.5, "layers.0": 1}, num_layers=2)
        (1.0, 0.5)
    """
    names = [f"layers.{layer}" for layer in range(num_layers)] if names is None else names
    if isinstance(weights, Mapping):
        for name in weights:
            if name not in names:
                hint = did_you_mean(str(name), names) or f": name {names[0]} to {names[-1]}"
                raise UserError(f"there is no '{name}' to give a weight{hint}")
        missing = [name for name in names if name not in weights]
        if missing:
            raise UserError(f"{missing[0]} has no weight ({len(missing)} are missing): give one to each, 0 for never")
        weights = [weights[name] for name in names]
    values = list(weights)
    if len(values) != len(names):
        raise UserError(f"{len(values)} weights were given for {len(names)} layers: give one for each")
    for name, value in zip(names, values, strict=True):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and value >= 0):
            raise UserError(f"the weight of {name} is {value!r}: give a number from 0 up")
    if not any(values):
        raise UserError("all weights are 0, so no layer would ever train: give at least one more than 0")
    return tuple(float(value) for value in values)
