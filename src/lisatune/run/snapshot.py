"""What a checkpoint holds of a learner, part by part, and how it is put back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from lisatune.common.equal_sums import processor_name
from lisatune.engine import LisaEngine
from lisatune.errors import UserError
from lisatune.learner import Learner
from lisatune.memory.blocks import whole_of
from lisatune.optim.saved_state import place_state
from lisatune.processes.collectives import num_ranks
from lisatune.processes.tensors import as_shard, whole
from lisatune.run.checkpoint import Checkpoint, Checkpoints, Damaged
from lisatune.run.determinism import blas
from lisatune.run.progress import Count, Progress
from lisatune.run.stores import ShardFiles, WholeFiles, open_store, saved_files
from lisatune.slices.engine import SliceEngine

COUNTERS = ("num_steps", "step")  # counters in an optimizer's groups; their other entries are settings


class State(BaseModel):
    """``state.json`` of a checkpoint."""

    model_config = ConfigDict(extra="forbid")

    progress: Progress = Field(alias="standing")
    drawn: tuple[Count, ...] | None
    sampler: dict[str, Any] | None
    counters: list[dict[str, Count]]
    scalars: dict[str, dict[str, dict[str, float | int | bool | None]]]
    base: dict[str, str]
    config: dict[str, Any]
    identity: dict[str, str]
    environment: dict[str, str]


class Snapshots:
    """Saves a learner into checkpoints and brings it back.

    Files of a checkpoint: ``weights-<part>`` for each part that has trained since the run began, ``state-<part>`` for each
    part that holds optimizer state. Of what never trained (layers not drawn yet, all that LoRA freezes) there is only the
    SHA-256: those weights are the base model's, which a resumed run loads anyway and has to find unchanged. Random states
    are not saved, because there are none: draws, noise and dropout are functions of the seed and the step.

    Args:
        learner: What ``make_learner`` gave, before its first step.
        checkpoints: Where checkpoints are kept.
        config: All settings, for the comparison at resume.
        identity: Names to what the run must find again, in words that a person can compare (the data's fingerprint).
        keep_best: The best checkpoint stays, and each one holds all that ever trains, so that ``put_back`` needs no base.
    """

    def __init__(
        self, learner: Learner, checkpoints: Checkpoints, config: dict[str, Any], identity: dict[str, str], *,
        keep_best: bool = False,
    ) -> None:  # fmt: skip
        self.learner = learner
        self.checkpoints = checkpoints
        self.config = config
        self.identity = identity
        self.keep_best = keep_best
        self._ever: set[str] = set()
        self._seen: dict[str, int] = {}  # what the learner's ``trained_at`` was at the last checkpoint
        self._base: dict[str, str] | None = None

    def save(self, progress: Progress) -> None:
        """A checkpoint of the learner between two steps.

        Cost: hashing of the whole model at the first one; then bytes of what has trained since the last.
        Raises: OSError if it cannot be written.
        """
        learner, known = self.learner, self.checkpoints.known()
        if learner.device.type == "cuda":
            torch.cuda.synchronize(learner.device)  # what is on its way to host memory has to be there
        if self._base is None:
            self._base = self._hash_base()

        # what has changed since the last checkpoint; the rest is already on the disk
        changed = {part for part, step in learner.trained_at.items() if self._seen.get(part) != step}
        self._ever |= self._trainable().keys() if self.keep_best else changed
        tensors: dict[str, dict[str, Tensor]] = {}
        unchanged: set[str] = set()
        scalars: dict[str, Any] = {}
        for part, parameters in self._trainable().items():
            states = learner.method.states(parameters, learner.optimizer)
            weights_file, state_file = f"weights-{part}", f"state-{part}"
            present = {weights_file} if part in self._ever else set()
            present |= {state_file} if any(state for _, state in states.values()) else set()
            still_right = present & known if part not in changed else set()
            unchanged |= still_right
            if weights_file in present - still_right:
                tensors[weights_file] = {n: self._to_save(p) for n, p in parameters.items()}
            if state_file in present - still_right:
                tensors[state_file] = self._state_tensors(states)
            numbers = {n: _scalars_of(state) for n, (_, state) in states.items()}
            if any(numbers.values()):
                scalars[part] = {n: values for n, values in numbers.items() if values}

        # all that is no tensor
        content = State(
            standing=progress,
            drawn=learner.engine.drawn if learner.engine else None,
            sampler=_sampler_state(learner),
            counters=[{k: g[k] for k in COUNTERS if isinstance(g.get(k), int)} for g in learner.optimizer.param_groups],
            scalars=scalars,
            base={part: digest for part, digest in self._base.items() if part not in self._ever},
            config=self.config,
            identity=self.identity,
            environment=environment(learner.device),
        )
        best = progress.best.step if self.keep_best and progress.best else None
        self.checkpoints.save(progress.step, tensors, unchanged, content.model_dump(by_alias=True), best=best)
        self._seen = dict(learner.trained_at)

    def _state_tensors(self, states: Mapping[str, tuple[Tensor, Mapping[str, Any]]]) -> dict[str, Tensor]:
        """Tensors of optimizer state, ``<entry>:<parameter>``; ``states`` as ``Method.states`` gives them."""
        return {
            f"{key}:{name}": self._to_save(as_shard(value, parameter))
            for name, (parameter, state) in states.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }

    def restore(self, checkpoint: Checkpoint) -> Progress:
        """Put the learner where it was when ``checkpoint`` was saved; if that fails, it is not to be used.

        Raises: UserError if the base model is another one; Damaged if the checkpoint does not fit the model.
        """
        learner, state = self.learner, read_state_of(checkpoint)

        # the base model, of which a checkpoint holds no copy
        self._base = self._hash_base()
        other = [part for part, digest in state.base.items() if self._base.get(part) != digest]
        if other:
            raise UserError(
                f"the base model is not the one that the run began with: its {other[0]} has other weights; put back the "
                f"model that {checkpoint.folder} was made from"
            )

        # the files of the parts that train here
        trainable, files = self._trainable(), saved_files(checkpoint)
        weights = {part: f"weights-{part}" for part in trainable if f"weights-{part}" in files}
        states = {part: f"state-{part}" for part in trainable if f"state-{part}" in files}
        if strangers := files - {*weights.values(), *states.values()}:
            raise Damaged(f"{checkpoint.folder}: {min(strangers)} belongs to no part of this model")

        # weights first, since state goes where the weights that train now are
        store = open_store(checkpoint, in_shards=learner.placement.in_shards)
        _read_weights(checkpoint, store, {name: trainable[part] for part, name in weights.items()})
        learner.placement.weights_changed()

        # what was sampled, so that the same parameters ask for gradients as then; then the optimizer's state
        if learner.engine is not None:
            _check_draw(checkpoint, state, learner.engine)
            learner.engine.resume(state.progress.step, state.drawn, learner.optimizer, state.sampler)
            learner.after_switch()
        for part, name in states.items():
            tensors = store.read_state(name, trainable[part])
            self._place_states(checkpoint, name, trainable[part], tensors, state.scalars.get(part, {}))
        for group, counters in zip(learner.optimizer.param_groups, state.counters, strict=False):
            group.update({name: count for name, count in counters.items() if name in COUNTERS})
        self._ever = set(weights)
        self._seen = dict(learner.trained_at)
        return state.progress

    def put_back(self, step: int) -> None:
        """Give the learner the weights of the checkpoint of ``step``; training is over.

        Raises: Damaged if that checkpoint is not whole.
        """
        checkpoint = self.checkpoints.read(step)
        store = open_store(checkpoint, in_shards=self.learner.placement.in_shards)
        weights = {f"weights-{part}": parameters for part, parameters in self._trainable().items()}
        _read_weights(checkpoint, store, weights)

    def _place_states(
        self, checkpoint: Checkpoint, file: str, parameters: Mapping[str, nn.Parameter],
        tensors: Mapping[str, dict[str, Any]], scalars: Mapping[str, dict[str, Any]],
    ) -> None:  # fmt: skip
        """Give ``parameters``, those of a part, the optimizer state that was in ``file`` and in ``state.json``."""
        learner, place = self.learner, partial(place_state, self.learner.optimizer)
        for name, values in tensors.items():
            if name.partition("[")[0] not in parameters:
                raise Damaged(f"{checkpoint.folder}: {file} holds {name[:80]}, which is not in that part of the model")
            try:
                learner.method.place_state(name, parameters, values | scalars.get(name, {}), place)
            except (KeyError, TypeError, AttributeError, RuntimeError) as error:
                raise Damaged(f"{checkpoint.folder}: {file} is not of this optimizer ({error})") from error

    def _trainable(self) -> dict[str, dict[str, nn.Parameter]]:
        """Parts to those of their parameters that the optimizer holds."""
        optimized = {id(whole_of(p)) for group in self.learner.optimizer.param_groups for p in group["params"]}
        parts = self.learner.layers.parts()
        found = {part: {n: p for n, p in every.items() if id(p) in optimized} for part, every in parts.items()}
        return {part: parameters for part, parameters in found.items() if parameters}

    def _to_save(self, tensor: Tensor) -> Tensor:
        return self.learner.placement.to_save(tensor, behind=self.checkpoints.background)

    def _hash_base(self) -> dict[str, str]:
        """SHA-256 of the weights as they are now, by part, and of what never trains in each: ``<part>/frozen``."""
        trainable = self._trainable()
        digests = {}
        for part, every in self.learner.layers.parts().items():
            trains = trainable.get(part, {})
            for name, parameters in {
                part: trains,
                f"{part}/frozen": {n: p for n, p in every.items() if n not in trains},
            }.items():
                if parameters:
                    digests[name] = _hash(parameters)
        return digests


@cache
def environment(device: torch.device) -> dict[str, str]:
    """What the bits of a sum may depend on, beside the numbers."""
    found = {package: version(package) for package in ("torch", "transformers")}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{torch.get_num_threads()} threads of a CPU"
        found["processor"] = f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}"
        found["BLAS"] = blas()
    return found | {"device": name + (f", {num_ranks()} processes" if num_ranks() > 1 else "")}


def read_state_of(checkpoint: Checkpoint) -> State:
    """``checkpoint.state``, checked.

    Raises: Damaged if it is not what ``Snapshots.save`` writes.
    """
    try:
        state = State.model_validate(checkpoint.state)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))[:80]
        raise Damaged(f"{checkpoint.folder / 'state.json'}: {place}: {first['msg'].lower()}") from error
    if state.progress.step != checkpoint.manifest.step:
        raise Damaged(f"{checkpoint.folder / 'state.json'} is of step {state.progress.step}")
    return state


def _hash(parameters: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, parameter in parameters.items():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(whole(parameter.detach()).to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _scalars_of(state: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    unknown = [key for key, value in found.items() if not isinstance(value, int | float | bool | None)]
    if unknown:
        raise UserError(
            f"the optimizer's state '{unknown[0]}' is neither a tensor nor a number, so it cannot be saved: use another optim"
        )
    return found


def _sampler_state(learner: Learner) -> dict[str, Any] | None:
    sampler = learner.engine.sampler if learner.engine else None
    return sampler.state_dict() if sampler is not None and sampler.learns else None


def _check_draw(checkpoint: Checkpoint, state: State, engine: LisaEngine | SliceEngine) -> None:
    """Refuse a draw that names no layer of this model, and the state of a sampler that has none."""
    if (
        state.drawn is None
        or any(i >= len(engine.pool) for i in state.drawn)
        or engine.sampler.learns != (state.sampler is not None)
    ):
        raise Damaged(f"{checkpoint.folder / 'state.json'}: its active layers were not drawn by this run's sampler")


def _read_weights(
    checkpoint: Checkpoint, store: WholeFiles | ShardFiles, weights: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Copy saved weights into parameters, which are given by file and name, once all of them fit."""
    for name, parameters in weights.items():
        _check_fit(checkpoint, name, parameters, store.shapes(name, parameters))
    store.read_weights(weights)


def _check_fit(
    checkpoint: Checkpoint, name: str, parameters: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a file whose tensors, of ``shapes``, are not those of ``parameters``."""
    expected = {n: tuple(p.shape) for n, p in parameters.items()}
    if shapes != expected:
        wrong = next(n for n in sorted({*shapes, *expected}) if shapes.get(n) != expected.get(n))
        raise Damaged(
            f"{checkpoint.folder}: {name} does not fit the model: {wrong[:80]} has the shape {shapes.get(wrong)}, the "
            f"model's {expected.get(wrong)}"
        )
