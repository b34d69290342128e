"""Seconds from a command to its first step, by parts, and of commands that need no model.

python benchmarks/startup.py --model DIR [--before COMMIT] [--turns 3] [--small] [--json FILE]

`--model` is SmolLM2-135M-Instruct as a folder; with `--model none` only the commands are timed. A Llama of 1.1 billion random weights in bfloat16 (the shape of TinyLlama)
is written to a temporary folder, and deleted. `--before` takes turns with the code of another commit. Rows are those of
GSM8K in shared/ beside the checkout. A run stops where its first step would begin. Seconds are the processor's, all
threads together, which other work on the machine changes little; the wall's are beside them.
"""

from __future__ import annotations

import argparse
import builtins
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
LLAMA = "from transformers import AutoTokenizer, LlamaForCausalLM"
COMMANDS = {
    "`python -c pass`": ["-c", "pass"],
    f"`{LLAMA}`": ["-c", LLAMA],
    "the same without a search for garbage": ["-c", f"import gc; gc.disable(); {LLAMA}; gc.freeze()"],
    "`import lisatune`": ["-c", "import lisatune"],
    "`lisatune --help`": ["-m", "lisatune", "--help"],
    "`lisatune train --help`": ["-m", "lisatune", "train", "--help"],
    "`lisatune settings`": ["-m", "lisatune", "settings"],
}
SETTINGS = ["max_steps=1", "device=cpu", "max_length=256", "per_device_train_batch_size=4"]
MOMENTS = ("processor", "wall")
STEP = "first step"  # where a run is stopped
# where the time of a run goes: the functions of each part, as module and name
PARTS = {
    "settings": ["lisatune.settings:read_settings", "lisatune.settings:build_config", "lisatune.run.build:settle"],
    "checks, and reading the rows": ["lisatune.run.preflight:preflight"],
    "tokenizer": ["transformers.models.auto.tokenization_auto:AutoTokenizer.from_pretrained"],
    "weights": ["lisatune.run.build:load_model"],
    "chats, labels and counts": ["lisatune.run.build:prepare_data"],
    "texts to ids": ["lisatune.data.tokenize:Encoder._tokenize"],
    "forecast": ["lisatune.run.build:plan_run"],
    "method and optimizer": ["lisatune.run.build:make_learner", "lisatune.run.build:describe_coverage"],
    "folder and journal": ["lisatune.train:hold", "lisatune.train:Saving", "lisatune.train:Journal", "lisatune.train:write_config"],
    "first batch": ["lisatune.data.loader:Loader.batches"],
    STEP: ["lisatune.run.build:Run.step"],
}  # fmt: skip
IMPORTS = ("torch", "transformers", "lisatune")  # each with what nobody has imported before it; all others are one part
STARTED = "STARTED_AT"  # the environment variable that tells a child when its parent started it


class Clock:
    """Charges every moment to one part: the innermost that is running."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.running = ["Python itself"]
        self.since = [0.0, float(os.environ[STARTED])]

    def charge(self) -> None:
        """Give the time since the last call to the part that is running."""
        now = [time.process_time(), time.monotonic()]
        for kind in range(2):
            self.spent[self.running[-1]][kind] += now[kind] - self.since[kind]
        self.since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done within belongs to ``name``."""
        self.charge()
        self.running.append(name)
        try:
            yield
        finally:
            self.charge()
            self.running.pop()

    def around(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """``function``, whose time belongs to ``name``; of an iterator, the time to its first element."""

        @wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            with self.part(name):
                result = function(*args, **options)
            return self._first(result, name) if isinstance(result, Iterator) else result

        return timed

    def _first(self, items: Iterator[Any], name: str) -> Iterator[Any]:
        with self.part(name):
            first = next(items)
        yield first
        yield from items

    def watch_imports(self, after: Callable[[], None]) -> None:
        """Give each import to the package in which it begins; call ``after`` when one is done."""
        plain, module = builtins.__import__, importlib.import_module

        def statement(name: str, *args: Any, **options: Any) -> Any:
            if name in sys.modules:
                return plain(name, *args, **options)
            with self.part(_import_of(name)):
                found = plain(name, *args, **options)
                after()
            return found

        def function(name: str, package: str | None = None) -> Any:
            with self.part(_import_of(package or name)):
                return module(name, package)

        builtins.__import__, importlib.import_module = statement, function


def _import_of(name: str) -> str:
    package = name.partition(".")[0]
    return f"import {package}" if package in IMPORTS else "import others"


def child(words: list[str]) -> None:
    """Run ``lisatune`` until the first step would begin, then print where the time went."""
    clock = Clock()
    clock.charge()
    clock.running = ["the rest"]
    waiting = [(function, name) for name, functions in PARTS.items() for function in functions]

    def stop(*_: Any) -> None:
        clock.charge()
        print(json.dumps(clock.spent), flush=True)
        os._exit(0)

    def wrap() -> None:
        """Time the functions of the modules that are there by now, before anybody takes them from there."""
        for function, name in list(waiting):
            home, _, path = function.partition(":")
            module = sys.modules.get(home)
            if module is None or getattr(module.__spec__, "_initializing", False):
                continue
            waiting.remove((function, name))
            owner: Any = module
            *classes, last = path.split(".")
            for one in classes:
                owner = getattr(owner, one)
            setattr(owner, last, stop if name == STEP else clock.around(getattr(owner, last), name))

    clock.watch_imports(wrap)
    import lisatune.cli

    sys.argv = ["lisatune", *words]
    lisatune.cli.main()


def start(source: Path, words: list[str]) -> tuple[str, list[float]]:
    """Run Python with the package in ``source``; what it printed, and its seconds of processor and wall."""
    begun = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(source), STARTED: str(begun)}
    run = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert run.stdout is not None
    assert run.stderr is not None
    with tempfile.TemporaryFile() as errors:
        text = run.stdout.read().decode()
        errors.write(run.stderr.read())
        _, status, usage = os.wait4(run.pid, 0)
        run.returncode = os.waitstatus_to_exitcode(status)
        if run.returncode:
            errors.seek(0)
            sys.exit(f"{words} failed: {errors.read().decode()}")
    return text, [usage.ru_utime + usage.ru_stime, time.monotonic() - begun]


def train(source: Path, model: Path, data: Path, *settings: str) -> dict[str, list[float]]:
    """The parts of one start of a run."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", "--model", str(model), "--data", str(data), "--output", f"{folder}/run"]
        text, _ = start(source, [__file__, "--child", *words, *SETTINGS, *settings])
    parts: dict[str, list[float]] = json.loads(text.splitlines()[-1])
    return parts


def measure(sources: dict[str, Path], folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds by what was started, then version, then part: a list of turns."""
    found: dict[str, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for turn in range(given.turns + 1):  # the first one reads files and writes bytecode: it does not count
        for name, words in COMMANDS.items():
            for version, source in sources.items():
                seconds = start(source, words)[1]
                found["commands"][version][name] += [seconds] * bool(turn)
    if str(given.model) == "none":
        return found
    from loading import write_model
    from results import SHARED

    data = SHARED / "data/gsm8k/train.jsonl.gz"
    models = {"135M": (given.model, [])}
    if not given.small:
        write_model(folder / "1B", "tinyllama-1.1b")
        models["1.1B"] = (folder / "1B", ["dtype=bfloat16"])
    for name, (model, settings) in models.items():
        for turn in range(given.turns + 1):
            for version, source in sources.items():
                parts = train(source, model, data, *settings)
                for part, seconds in parts.items():
                    found[name][version][part] += [seconds] * bool(turn)
                print(name, version, f"{sum(s[0] for s in parts.values()):.2f}", file=sys.stderr, flush=True)
    return found


def table(measured: dict[str, dict[str, list[list[float]]]], *, summed: bool) -> str:
    """Medians of the turns: a row for each part, columns for each version."""
    from results import markdown

    def mid(version: str, part: str, kind: int) -> float:
        return median(turn[kind] for turn in measured[version].get(part) or [[0.0, 0.0]])

    parts = list(dict.fromkeys(part for version in measured.values() for part in version))
    if summed:
        first, *_ = measured
        parts.sort(key=lambda part: -mid(first, part, 0))
    rows = [[part, *(f"{mid(v, part, kind):.2f}" for kind in range(2) for v in measured)] for part in parts]
    if summed:
        for version in measured.values():  # of each turn; the parts' medians need not add up
            version["**together**"] = [[sum(s[k] for s in turn) for k in range(2)] for turn in zip(*version.values(), strict=True)]  # fmt: skip
        rows.append(["**together**", *(f"{mid(v, '**together**', kind):.2f}" for kind in range(2) for v in measured)])
    head = ["", *(f"{kind} s, {v}" if len(measured) > 1 else f"{kind} s" for kind in MOMENTS for v in measured)]
    return markdown(head, rows)


def main() -> None:
    """Measure, and write the page."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, type=Path, help="Folder of SmolLM2-135M-Instruct, or none.")
    parser.add_argument("--before", metavar="COMMIT", help="Take turns with the code of this commit.")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="Leave the model of 1.1B out.")
    parser.add_argument("--json", type=Path, help="Write each turn's seconds to this file too.")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        sources = {"now": ROOT / "src"}
        if given.before:
            archive = subprocess.run(["git", "archive", given.before, "src"], cwd=ROOT, check=True, capture_output=True)
            subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)
            sources = {"before": Path(folder) / "src"} | sources
        found = measure(sources, Path(folder), given)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    from results import write_page

    text = ABOUT.format(turns=given.turns, before=f" *before* is commit {given.before}." * bool(given.before))
    for name, measured in found.items():
        text += f"\n\n## {TITLES[name]}\n\n{table(measured, summed=name != 'commands')}"
    print(write_page("startup", f"{text}\n\n{WHY}", __doc__ or "").read_text())


TITLES = {
    "commands": "Commands",
    "135M": "SmolLM2-135M, to the first step",
    "1.1B": "1.1B random weights in bfloat16, to the first step",
}
ABOUT = (
    "Medians of {turns} starts, after one that does not count.{before} Files are in the system's cache. Other work ran on the machine, so compare "
    "the processor's seconds. An import belongs to the package that asks for it first; its own imports of other packages do not."
)  # fmt: skip
WHY = """## What is left, and why

- **Imports.** They are those of a script that imports `LlamaForCausalLM` and does nothing: torch, transformers, and what transformers brings (torch's
  compiler, sympy, scipy, accelerate). A command that ends also pays for taking all of it apart. Without Python's search for garbage both are quicker.
- **Texts to ids.** This is the Rust code of `tokenizers`, which is asked for ids alone. It uses all cores if it may: `TOKENIZERS_PARALLELISM=false` stops that.
  Larger data is encoded once and kept (`dataset_prepared_path`).
- **Chats, labels and counts.** The chat template writes each row twice: its prompt, and all of it. Only so is an answer where generation would begin it.
- **Forecast.** It takes two steps on the meta device, a layer after the other. What an operation gives is remembered by shape. `train` tells the forecast and
  `report` sets it beside what was measured, so it is not left out.
- **Method and optimizer.** Two tokens go through the model, to see that its loss may be computed in parts. They read the weights, which the first step needs anyway.
- **Weights.** They are pages of the file. What a step does not need is not read."""


if __name__ == "__main__":
    main()
