"""Which levers make a run fit into a given memory, the cheapest in time first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from lisatune.common.amounts import gib
from lisatune.errors import UserError
from lisatune.optim import OPTIMS
from lisatune.plan.fake_processes import fake_processes
from lisatune.plan.forecast import Plan, model_config, plan_config, plan_run
from lisatune.processes.collectives import most, num_ranks, rank
from lisatune.settings import LAYERWISE, ROWS, TrainConfig, build_config, check_num_ranks, plays, with_new_names
from lisatune.slices.engine import usual_num_slices

# what a forecast for a GPU leaves out (the context, libraries' workspaces, fragmentation) has to fit as well
UNCOUNTED_BYTES = {"cuda": 2**30, "mps": 2**30, "cpu": 0}

# The order (`ladder` in the rows of the settings) is that of their price in time for a model of billions and thousands of
# tokens a step, by arithmetic: none; that
# of short moments, once a step; up to three more products with the head, 2 to 5% there; one more forward pass, up to a third;
# smaller products; copies to host memory of moments once a step, of layer inputs and of all frozen layers twice a
# micro-batch. With 135M parameters and 512 tokens a step on a CPU, where head and optimizer weigh more, benchmarks/cost.py
# has 1.02 for the first, then 1.26, 1.18 and 1.23.
# Of several processes the first is to split weights among all: on links that are quick enough, messages go while layers compute.
LEVERS: tuple[tuple[str, Any], ...] = tuple(
    (name, row.pulled)
    for name, row in sorted(ROWS.items(), key=lambda item: item[1].ladder or 0)
    if row.ladder is not None
)


@dataclass(frozen=True)
class Rung:
    """One more lever pulled than on the rung before.

    Args:
        lever: The setting that was added, as one types it; empty on the first rung.
        config: The run with all levers so far.
        plan: Its forecast.
    """

    lever: str
    config: TrainConfig
    plan: Plan


def budget_of(memory_bytes: int, device: str) -> int:
    """What a forecast may come to on a device of ``memory_bytes``."""
    return memory_bytes - UNCOUNTED_BYTES[device]


@dataclass(frozen=True)
class Forecast:
    """What ``lisatune plan`` tells: methods side by side and, for a given memory, what fits into it."""

    plans: list[Plan]
    budget: int | None = None
    rungs: list[Rung] = field(default_factory=list)
    reach: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        levers = [{"lever": rung.lever, "plan": rung.plan.as_dict()} for rung in self.rungs]
        return {
            "plans": [p.as_dict() for p in self.plans],
            "budget": self.budget,
            "levers": levers,
            "reach": self.reach,
            "refused": self.refused,
        }


def forecast(
    settings: dict[str, Any],
    methods: Sequence[str],
    device: str = "cuda",
    memory_bytes: int | None = None,
    nproc: int = 1,
    host_bytes: int | None = None,
) -> Forecast:
    """Plans of ``methods`` with the same settings; with ``memory_bytes`` also the levers that make the first one fit.

    A setting that plays no part in a method (``lora_r`` in LISA, ``vocabulary_blocks`` in LoRA) is left out for it. With
    ``nproc`` processes, plans are those of one of them; so is ``host_bytes``, the limit of host memory. A method that the model cannot have (LoRA on a Mamba) is told in
    ``refused``, and does not stop the others.

    Raises: UserError for settings that cannot be, if the first method cannot be, or if nothing fits.
    """
    settings = {name: value for name, value in with_new_names(settings).items() if name not in ("data", "output")}
    hf_config = model_config(str(settings["model"]), trust_remote_code=bool(settings.get("trust_remote_code")))
    with fake_processes(nproc):
        configs = [plan_config(_for_method(settings, method, alone=len(methods) == 1), device) for method in methods]
        plans, refused = list[Plan](), dict[str, str]()
        for config in configs:
            try:
                plans.append(plan_run(config, hf_config, device))
            except UserError as error:
                if config is configs[0] or len(configs) == 1:
                    raise
                refused[config.method] = str(error)
        if memory_bytes is None:
            return Forecast(plans, refused=refused)
        rungs = climb(configs[0], hf_config, memory_bytes, device, host_bytes=host_bytes)
        return Forecast(
            plans,
            budget_of(memory_bytes, device),
            rungs,
            reach(rungs[-1], hf_config, memory_bytes, device, host_bytes=host_bytes),
            refused,
        )


def _for_method(settings: dict[str, Any], method: str, *, alone: bool) -> dict[str, Any]:
    chosen = settings | {"method": method}
    if alone:  # then a setting without effect is a mistake
        return chosen
    idle = f"method={method}"
    return {n: v for n, v in chosen.items() if n not in ROWS or (plays(n, method) and idle not in ROWS[n].idle_with)}


def climb(
    config: TrainConfig, hf_config: Any, memory_bytes: int, device: str = "cuda", *, tokens: int | None = None,
    host_bytes: int | None = None,
) -> list[Rung]:  # fmt: skip
    """Pull levers until the run fits; the last rung is the one that does.

    A lever that the user has set, either way, stays as it is, and one that is refused with the rest is left out. Rows of
    a micro-batch are halved, with twice the accumulation, so that a step stays the same. If checkpointing is what
    makes the run fit, only as many layers are checkpointed as needed.

    Args:
        config: The run.
        hf_config: The model's transformers config.
        memory_bytes: Memory of the device; ``UNCOUNTED_BYTES`` of it are left for what a forecast does not count.
        device: ``cuda``, ``mps`` or ``cpu``.
        tokens: Tokens of a row; by default ``max_length``.
        host_bytes: Host memory for each process, if it is limited. A lever that would take more is left out.
    Raises: UserError telling the smallest peak there is and what it would need, if nothing fits.
    Cost: a forecast for each rung, and for halving the number of checkpointed layers.
    """
    budget = budget_of(memory_bytes, device)

    def rung(lever: str, config: TrainConfig) -> Rung:
        return Rung(lever, config, plan_run(config, hf_config, device, tokens=tokens))

    rungs: list[Rung] = []
    for next_rung in ladder(config, hf_config, device, tokens=tokens, host_bytes=host_bytes):
        rungs.append(next_rung)
        if not _fits_host(next_rung, host_bytes):  # the first one: what the user has set
            raise UserError(
                f"{gib(next_rung.plan.host_bytes)} of host memory are needed, but there are {gib(host_bytes or 0)}: leave "
                "out a setting that moves something there (offload_frozen, frozen_bits, offload_optimizer, activation_offloading)"
            )
        if fits := _fits(next_rung, budget):
            break
    last = rungs[-1]
    if not fits:
        smallest = min(rungs, key=lambda r: r.plan.peak_bytes)
        levers = pulled(rungs[0], smallest) or "no lever is left to pull"
        host = "" if host_bytes is None else f"; with {gib(host_bytes)} of host memory"
        raise UserError(
            f"nothing fits into {gib(memory_bytes)} ({gib(max(0, budget))} for the run, the rest kept free): the smallest peak "
            f"of method={config.method} with rows of {smallest.plan.tokens} tokens is {gib(smallest.plan.peak_bytes)} "
            f"({levers}{host}). Take a device of {gib(smallest.plan.peak_bytes + UNCOUNTED_BYTES[device])}, a smaller "
            "max_length, or a smaller model"
        )
    if last.lever == "gradient_checkpointing=true":
        rungs[-1] = _fewest_recomputed(last, budget, rung)
    return rungs


def _fits_host(rung: Rung, host_bytes: int | None) -> bool:
    """Whether each process stays within ``host_bytes`` of host memory; all of them get the same answer."""
    return host_bytes is None or most(rung.plan.host_bytes)[0] <= host_bytes


def _fits(rung: Rung, budget: int) -> bool:
    """Whether no process would hold more than ``budget``; all of them get the same answer."""
    return most(rung.plan.peak_bytes)[0] <= budget


def ladder(
    config: TrainConfig,
    hf_config: Any,
    device: str = "cuda",
    *,
    tokens: int | None = None,
    host_bytes: int | None = None,
) -> Iterator[Rung]:
    """``config`` with one more lever at a time, in their order; each costs a forecast.

    A lever that would take more than ``host_bytes`` of host memory is left out.
    """

    def rung(lever: str, config: TrainConfig) -> Rung:
        return Rung(lever, config, plan_run(config, hf_config, device, tokens=tokens))

    yield rung("", config)
    for name, value in LEVERS:
        while (more := _with_lever(config, name, value)) is not None:
            found = rung(_typed(name, more), more)
            if not _fits_host(found, host_bytes):
                break
            config = more
            yield found
            if name != "per_device_train_batch_size":
                break


@contextmanager
def explain_out_of_memory(config: TrainConfig, hf_config: Any, device: str, tokens: int) -> Iterator[None]:
    """Turn the device's running out of memory into a UserError that names the levers left and what they would save."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in text):
            raise
        if num_ranks() > 1:  # the others would wait for a forecast that they take no part in
            raise UserError(
                f"out of memory on {device} of rank {rank()} ({text.splitlines()[0][:200] if text else 'no memory is left'}): "
                f"lisatune plan --nproc {num_ranks()} --gpu-memory MEMORY finds settings that fit; "
                "dp_shard_size and gradient_checkpointing=true save most"
            ) from error
        first, *more = ladder(config, hf_config, device, tokens=tokens)
        levers, peak = [], first.plan.peak_bytes
        for rung in more:
            if rung.plan.peak_bytes < peak:
                peak = rung.plan.peak_bytes
                levers.append(f"{rung.lever} ({gib(peak)})")
        advice = (
            f"add levers until it fits, each with those before it: {', '.join(levers)}"
            if levers
            else "no lever is left"
        )
        raise UserError(
            f"out of memory on {device} ({text.splitlines()[0][:200] if text else 'no memory is left'}); predicted was a peak "
            f"of {gib(first.plan.peak_bytes)}: {advice}; or add --fit with your device's memory, or set a smaller max_length"
        ) from error


def pulled(first: Rung, last: Rung) -> str:
    """The settings in which ``last`` differs from ``first``, as one types them; not what follows from them."""
    before, after = first.config.model_dump(), last.config.model_dump(exclude_unset=True)
    return " ".join(f"{name}={str(after[name]).lower()}" for name in after if after[name] != before[name])


def _with_lever(config: TrainConfig, name: str, value: Any) -> TrainConfig | None:
    """``config`` with a lever more; None if there is none to pull."""
    if name == "per_device_train_batch_size":
        if config.per_device_train_batch_size % 2 or config.optimizer_in_backward:
            return None
        rows, times = config.per_device_train_batch_size // 2, config.gradient_accumulation_steps * 2
        return _with(config, per_device_train_batch_size=rows, gradient_accumulation_steps=times)
    if name in config.model_fields_set or (name == "optim" and not OPTIMS[config.optim].in_blocks):
        return None
    if name == "dp_shard_size" and num_ranks() == 1:
        return None
    try:
        return _with(config, **{name: num_ranks() if name == "dp_shard_size" else value})
    except UserError:  # it has no effect with this method, or cannot go with what is set
        return None


def _typed(name: str, config: TrainConfig) -> str:
    """The lever ``name`` of ``config`` as one types it."""
    names = [name] + (["gradient_accumulation_steps"] if name == "per_device_train_batch_size" else [])
    return " ".join(f"{name}={str(getattr(config, name)).lower()}" for name in names)


def _with(config: TrainConfig, **more: Any) -> TrainConfig:
    config = build_config(config.model_dump(exclude_unset=True) | more)
    check_num_ranks(config, num_ranks())
    return config


def _fewest_recomputed(last: Rung, budget: int, rung: Callable[[str, TrainConfig], Rung]) -> Rung:
    few, enough, best = 0, last.plan.num_layers, last
    while enough - few > 1:
        middle = (few + enough) // 2
        tried = rung(f"gradient_checkpointing={middle}", _with(last.config, gradient_checkpointing=middle))
        if _fits(tried, budget):
            enough, best = middle, tried
        else:
            few = middle
    return best


def reach(
    rung: Rung, hf_config: Any, memory_bytes: int, device: str = "cuda", *, host_bytes: int | None = None
) -> dict[str, int]:
    """How far ``rung`` can be stretched within the same memory, each by itself: sequence, micro-batch, active layers."""
    budget, config, plan = budget_of(memory_bytes, device), rung.config, rung.plan
    limit = getattr(hf_config.get_text_config(), "max_position_embeddings", None)

    def peak(config: TrainConfig = config, rows: int = plan.rows, tokens: int = plan.tokens) -> int:
        found = plan_run(config, hf_config, device, rows=rows, tokens=tokens)
        if host_bytes is None or not config.activation_offloading:
            return found.peak_bytes
        return max(found.peak_bytes, found.host_bytes - host_bytes + budget)  # whichever is full first

    longest = largest(lambda n: peak(tokens=n), budget, plan.tokens, unit=64 if plan.tokens >= 64 else 1, limit=limit)
    found = {
        "tokens of a row" + (" (the model's whole context)" if longest == limit else ""): longest,
        "rows of a micro-batch": largest(lambda n: peak(rows=n), budget, plan.rows),
    }
    if config.method in LAYERWISE:
        sliced = config.sampled_unit == "slices"
        found["active slices" if sliced else "active layers"] = largest(
            lambda n: peak(config.model_copy(update={"num_active": n})),
            budget,
            config.num_active,
            limit=(config.num_slices or usual_num_slices(plan.num_layers)) if sliced else plan.num_layers,
        )
    return found


def largest(peak_of: Callable[[int], int], budget: int, start: int, *, unit: int = 1, limit: int | None = None) -> int:
    """The largest multiple of ``unit``, at most ``limit``, at which a growing peak stays within ``budget``; or 0.

    Peaks grow in straight lines with kinks, so a step along the line between two points lands near the answer.

    Example:
        >>> largest(lambda n: 100 + 7 * n, budget=1000, start=8)
        128
    """
    low, low_peak = 0, peak_of(unit)
    if low_peak > budget:
        return 0
    low, high, high_peak = unit, max(start, 2 * unit), None
    for _ in range(12):
        high = min(high, limit // unit * unit) if limit else high
        high_peak = peak_of(high)
        if high_peak <= budget:
            if limit and high >= limit // unit * unit:
                return high
            slope = (high_peak - low_peak) / max(1, high - low)
            low, low_peak = high, high_peak
            step = int((budget - low_peak) / slope) if slope > 0 else high
            high = low + max(unit, step // unit * unit)
        else:
            if high - low <= unit:
                return low
            slope = (high_peak - low_peak) / (high - low)
            guess = low + int((budget - low_peak) / slope) // unit * unit
            high = min(max(guess, low + unit), high - unit)
    return low
