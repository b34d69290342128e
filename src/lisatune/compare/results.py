"""What runs measured, and what that says of the contenders of a comparison. Needs no torch."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lisatune.common.loss_names import other_losses
from lisatune.common.run_folder import finished
from lisatune.compare.grid import Grid, Trial, command
from lisatune.errors import UserError

TOLERANCE = 1.01  # peaks within this factor count as equal: two runs of one setting differ by less


@dataclass(frozen=True)
class Measured:
    """The numbers of a finished run; ``curve`` has ``step``, ``tokens``, ``seconds`` and ``eval_loss`` of each evaluation.

    ``seconds`` are those of the steps alone, so that who is evaluated more often is not the slower for it.
    """

    summary: dict[str, Any]
    curve: list[dict[str, float]]
    tokens_per_second: float
    bytes_of: dict[str, int]

    @property
    def loss(self) -> float:
        """Held-out loss at the end; infinite if it is no number."""
        loss = self.summary.get("eval_loss_after")
        return float(loss) if loss is not None and math.isfinite(loss) else math.inf

    @property
    def own_bytes(self) -> int:
        """The peak of tensors, which is what a forecast predicts; of a run that did not count them, the process's growth."""
        if tensors := self.summary.get("tensor_peak_bytes"):
            return int(tensors)
        return max(0, int(self.summary["peak_bytes"]) - int(self.summary["base_bytes"]))

    def at(self, place: str, value: float) -> float | None:
        """Held-out loss where ``place`` (tokens or seconds) was ``value``, on the straight line between two evaluations.

        None if it was not evaluated between the start and the end.
        """
        if not self.curve or value >= self.curve[-1][place]:
            return self.loss
        if len(self.curve) < 3:
            return None
        for a, b in zip(self.curve, self.curve[1:], strict=False):
            if a[place] <= value < b[place]:
                share = (value - a[place]) / (b[place] - a[place])
                return a["eval_loss"] + share * (b["eval_loss"] - a["eval_loss"])
        return None


def read_run(folder: Path) -> Measured | None:
    """The numbers of the run in ``folder``; None if it is not finished."""
    summary = finished(folder)
    if summary is None:
        return None
    try:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        tokens, seconds, step, curve, speeds = 0.0, 0.0, 0, [], []
        for row in rows:
            tokens += (row["step"] - step) * row.get("tokens", 0)
            seconds += (row["step"] - step) * row.get("step_seconds", 0.0)
            step = row["step"]
            if row.get("step_seconds"):
                speeds.append(row["tokens"] / row["step_seconds"])
            if "eval_loss" in row:
                curve.append({"step": step, "tokens": tokens, "seconds": seconds, "eval_loss": row["eval_loss"]})
        bytes_of = rows[0].get("plan", {}).get("bytes_of", {}) if rows else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'metrics.jsonl'} cannot be read ({error}): remove {folder} to run it again"
        ) from error
    return Measured(summary, curve, statistics.median(speeds) if speeds else 0.0, bytes_of)


def student_t(chance: float, degrees: int) -> float:
    """The t with ``P(|T| <= t) = chance`` for Student's T of so many ``degrees`` of freedom (from 1).

    With theta = atan(t / sqrt(n)) that chance is a finite sum of powers of cos(theta) (Abramowitz and Stegun 26.7.3 and
    26.7.4); theta is found by halving.

    Example:
        >>> [round(student_t(0.95, n), 3) for n in (1, 2, 4, 30)]
        [12.706, 4.303, 2.776, 2.042]
    """

    def within(theta: float) -> float:
        cosine, odd = math.cos(theta), degrees % 2
        total, term = 0.0, cosine if odd else 1.0
        for k in range(2 + odd, degrees + 1, 2):
            total += term
            term *= (k - 1) / k * cosine * cosine
        if odd:
            return 2 / math.pi * (theta + math.sin(theta) * total)
        return math.sin(theta) * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < chance else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def interval(values: Sequence[float], confidence: float = 0.95) -> dict[str, Any]:
    """Mean of ``values`` and its confidence interval by Student's t; of one value there is none.

    Example:
        >>> interval([1.0, 2.0, 3.0])
        {'mean': 2.0, 'low': -0.484..., 'high': 4.484..., 'values': [1.0, 2.0, 3.0]}
    """
    mean, low, high = statistics.fmean(values), None, None
    if len(values) > 1:
        half = student_t(confidence, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
        low, high = mean - half, mean + half
    return {"mean": mean, "low": low, "high": high, "values": list(values)}


@dataclass
class _Contender:
    """Runs of one contender: ``choices`` are the searched values of which every seed has ended well."""

    name: str
    trials: list[Trial]
    measured: Mapping[str, Measured]
    seeds: list[int]

    def __post_init__(self) -> None:
        self.runs: dict[str, dict[int, Measured]] = {}
        self.searched: dict[str, dict[str, Any]] = {}
        for trial in self.trials:
            key = json.dumps(trial.searched, default=str)
            self.searched[key] = trial.searched
            if trial.name in self.measured:
                self.runs.setdefault(key, {})[trial.config.seed] = self.measured[trial.name]
        self.choices = [
            key for key, runs in self.runs.items() if all(s in runs and runs[s].loss < math.inf for s in self.seeds)
        ]

    def best(self, seeds: Iterable[int]) -> str:
        """The searched values with the lowest mean loss over ``seeds``."""
        seeds = list(seeds)
        return min(self.choices, key=lambda key: statistics.fmean(self.runs[key][s].loss for s in seeds))

    def chosen_for(self) -> dict[int, str]:
        """For each seed the choice that the other seeds make, so that no loss is reported on what it was chosen by."""
        if len(self.seeds) == 1:
            return {seed: self.best([seed]) for seed in self.seeds}
        return {seed: self.best(s for s in self.seeds if s != seed) for seed in self.seeds}

    def reported(self) -> dict[int, Measured]:
        """The run that stands for each seed."""
        return {seed: self.runs[key][seed] for seed, key in self.chosen_for().items()}


def results(
    grid: Grid,
    measured: Mapping[str, Measured],
    failed: Mapping[str, str],
    *,
    memory_bytes: int | None = None,
) -> dict[str, Any]:
    """The comparison as plain values, contenders in the order given.

    ``eval_loss`` is the mean over the seeds with its 95% interval. For each seed the searched values are those with the
    lowest mean over the *other* seeds; ``chosen`` is what all seeds together choose. Values at which any seed has failed
    are not chosen. ``difference`` is the mean over seeds of what lies between a contender and the first.
    ``equal_tokens`` and ``equal_time`` are losses where the shortest and the fastest contender ended.
    """
    seeds = list(dict.fromkeys(trial.config.seed for trial in grid.trials))
    contenders = [_Contender(name, grid.of(name), measured, seeds) for name in grid.contenders()]
    ready = {c.name: c.reported() for c in contenders if c.choices and _all_ended(c, failed)}
    equal = _equal(ready, seeds)
    entries = [_entry(c, ready, equal, failed) for c in contenders]
    if "trials" in grid.given:
        entries = [entry | {"edge": {}} for entry in entries]  # what was tried last is no edge of a range

    # which fit into the memory, and which no other beats in both memory and loss
    within = [e for e in entries if e["status"] == "finished"]
    budget = memory_bytes or min((int(e["peak_bytes"] * TOLERANCE) for e in within), default=0)
    for entry in within:
        entry["fits"] = entry["peak_bytes"] <= budget
        entry["frontier"] = not any(
            o["peak_bytes"] * TOLERANCE < entry["peak_bytes"] and o["eval_loss"]["mean"] <= entry["eval_loss"]["mean"]
            for o in within
        )

    # the best of each method that fits
    fitting: dict[str, str | None] = {}
    for method in dict.fromkeys(entry["method"] for entry in entries):
        fits = [e for e in within if e["method"] == method and e["fits"]]
        fitting[method] = min(fits, key=lambda e: e["eval_loss"]["mean"])["name"] if fits else None
    runs = [_run_entry(trial, measured.get(trial.name), failed.get(trial.name)) for trial in grid.trials]
    return {
        "command": command(grid.given),
        "reference": next(iter(ready), None),
        "search": list(grid.search),
        "trials": grid.given.get("trials"),
        "seeds": seeds,
        "runs_per_contender": len(grid.trials) // len(contenders),
        "confidence": 0.95,
        "equal": equal | {"bytes": budget, "best_within_bytes": fitting},
        "finished": [run["name"] for run in runs if run["status"] == "finished"],
        "contenders": entries,
        "runs": runs,
    }


def _all_ended(contender: _Contender, failed: Mapping[str, str]) -> bool:
    return all(t.name in contender.measured or t.name in failed for t in contender.trials)


def _equal(ready: Mapping[str, Mapping[int, Measured]], seeds: Sequence[int]) -> dict[str, Any]:
    """For each seed: the tokens of the shortest run, and the seconds of the fastest contender."""
    if not ready:
        return {"tokens": {}, "seconds": {}, "fastest": None}

    def seconds(name: str) -> float:
        return statistics.fmean(run.curve[-1]["seconds"] for run in ready[name].values())

    fastest = min(ready, key=seconds)
    return {
        "tokens": {seed: min(runs[seed].curve[-1]["tokens"] for runs in ready.values()) for seed in seeds},
        "seconds": {seed: ready[fastest][seed].curve[-1]["seconds"] for seed in seeds},
        "fastest": fastest,
    }


def _entry(
    contender: _Contender,
    ready: Mapping[str, Mapping[int, Measured]],
    equal: Mapping[str, Any],
    failed: Mapping[str, str],
) -> dict[str, Any]:
    """One contender: what it is, and the numbers of its runs if all have finished."""
    trials = contender.trials
    status = "failed" if _all_ended(contender, failed) else "unfinished"
    if contender.name in ready:
        status = "finished"
    entry: dict[str, Any] = {
        "name": contender.name,
        "method": trials[0].config.method,
        "varied": trials[0].varied,
        "status": status,
        "failed": {t.name: failed[t.name] for t in trials if t.name in failed}
        | {t.name: "the held-out loss is no number" for t in trials if _no_number(contender.measured.get(t.name))},
        "by_search": [
            {
                "searched": contender.searched[key],
                "eval_loss": interval([contender.runs[key][s].loss for s in contender.seeds]),
            }
            for key in contender.choices
        ],
    }
    return entry | (_numbers(contender, ready, equal) if status == "finished" else {})


def _numbers(
    contender: _Contender, ready: Mapping[str, Mapping[int, Measured]], equal: Mapping[str, Any]
) -> dict[str, Any]:
    """Losses at the chosen values and their difference to the first contender's; memory and time of all its runs."""
    runs, first = ready[contender.name], next(iter(ready.values()))
    chosen = contender.best(contender.seeds)
    losses = [runs[seed].loss for seed in contender.seeds]
    differences = interval([runs[seed].loss - first[seed].loss for seed in contender.seeds])
    low, high = differences["low"], differences["high"]
    every = [m for by_seed in contender.runs.values() for m in by_seed.values()]
    some = next(iter(runs.values()))
    return {
        "chosen": contender.searched[chosen],
        "chosen_by_seed": {seed: contender.searched[key] for seed, key in contender.chosen_for().items()},
        "edge": _edges(contender, chosen),
        "eval_loss_before": statistics.fmean(run.curve[0]["eval_loss"] for run in runs.values()),
        "eval_loss": interval(losses),
        "difference": differences | {"excludes_zero": low is not None and high is not None and not low <= 0 <= high},
        "equal_tokens": _mean_at(runs, "tokens", equal["tokens"]),
        "equal_time": _mean_at(runs, "seconds", equal["seconds"]),
        "peak_bytes": max(run.own_bytes for run in every),
        "planned_peak_bytes": some.summary.get("planned_peak_bytes"),
        "bytes_of": some.bytes_of,
        "state_bytes": max(run.summary["state_bytes"] for run in every),
        "tokens_per_second": statistics.median(run.tokens_per_second for run in every),
        "tokens": statistics.fmean(run.summary["tokens"] for run in runs.values()),
        "step_seconds": statistics.fmean(run.curve[-1]["seconds"] for run in runs.values()),
        "train_seconds": statistics.fmean(run.summary["train_seconds"] for run in runs.values()),
        "scores": _mean_scores(runs.values()),
        "curve": _mean_curve(list(runs.values())),
    }


def _no_number(run: Measured | None) -> bool:
    return run is not None and run.loss == math.inf


def _edges(contender: _Contender, chosen: str) -> dict[str, str]:
    """Searched numbers whose choice is the least or the most that was tried: the best may lie beyond."""
    edges: dict[str, str] = {}
    for name, value in contender.searched[chosen].items():
        tried = {searched[name] for searched in contender.searched.values()}
        if len(tried) > 1 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in tried):
            edges |= {name: "lowest"} if value == min(tried) else {name: "highest"} if value == max(tried) else {}
    return edges


def _mean_at(runs: Mapping[int, Measured], place: str, values: Mapping[int, float]) -> dict[str, Any] | None:
    losses = [run.at(place, values[seed]) for seed, run in runs.items()]
    return None if None in losses else interval([loss for loss in losses if loss is not None])


def _mean_scores(runs: Iterable[Measured]) -> dict[str, Any]:
    """Task scores, where the runs have some (``scores`` in their summaries), and losses of further held-out sets."""
    scores: dict[str, list[float]] = {}
    for run in runs:
        others = list(other_losses(run.summary, "_after").items())[1:]
        named = {f"{name} loss": loss for name, loss in others}
        for task, score in (named | (run.summary.get("scores") or {})).items():
            scores.setdefault(task, []).append(float(score))
    return {task: interval(values) for task, values in scores.items()}


def _mean_curve(runs: Sequence[Measured]) -> list[dict[str, float]]:
    """Mean over the seeds at each evaluation, and the least and the most."""
    curve = []
    for points in zip(*(run.curve for run in runs), strict=False):
        losses = [p["eval_loss"] for p in points]
        means = {name: statistics.fmean(p[name] for p in points) for name in ("step", "tokens", "seconds", "eval_loss")}
        curve.append(means | {"least": min(losses), "most": max(losses)})
    return curve


def _run_entry(trial: Trial, run: Measured | None, failure: str | None) -> dict[str, Any]:
    status = "finished" if run is not None else "failed" if failure else "unfinished"
    entry = {"name": trial.name, "contender": trial.contender, "searched": trial.searched, "seed": trial.config.seed,
             "status": status}  # fmt: skip
    if run is not None:
        return entry | {"eval_loss": run.loss if run.loss < math.inf else None}
    return entry | ({"failure": failure} if failure else {})
