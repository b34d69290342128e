"""Methods and settings side by side: a grid of runs, each in a process of its own, and what came of them. Needs no torch.

A grid has three kinds of settings. Those in ``search`` (``learning_rate``, unless told otherwise) are tuned for each contender;
``seed`` is averaged over; any other that holds several values names a contender, as ``method`` does. Every contender gets
the same number of runs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lisatune.common.console import tell, warn
from lisatune.common.files import write_whole
from lisatune.common.run_folder import finished, only_run
from lisatune.common.signals import StopSignal, stop_signals
from lisatune.compare.grid import Grid, Trial, identity, make_grid, read_grid
from lisatune.compare.results import Measured, read_run, results
from lisatune.data.examples import read_examples
from lisatune.errors import NEEDS_MATPLOTLIB, Stopped, UserError
from lisatune.models.names import check_model_name
from lisatune.run.preflight import check_num_layers
from lisatune.settings import build_config, read_settings

POLL_SECONDS = 0.2


Runner = Callable[[Trial, Path, StopSignal, Callable[[], None]], str]


def run_in_child(trial: Trial, folder: Path, stop: StopSignal, tick: Callable[[], None]) -> str:
    """Train ``trial`` in a process of its own; a signal that comes meanwhile is handed on, and the run saves itself.

    Returns: Why the run failed, in a sentence; nothing if it did not.
    """
    log = folder / "runs" / f"{trial.name}.log"
    settings = str(log.with_name(trial.name + ".yaml"))
    command = [sys.executable, "-m", "lisatune", "train", "--config", settings, "--resume"]
    with log.open("ab") as file:
        begin = file.tell()
        # a session of its own: Ctrl-C reaches it once, through us, since a second one would end it before it has saved
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file, start_new_session=True,
            env=os.environ | {"NO_COLOR": "1", "COLUMNS": "120", "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            _attend(child, stop, tick)
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
    return _why_it_failed(child.returncode, log, begin)


def _attend(child: subprocess.Popen[bytes], stop: StopSignal, tick: Callable[[], None]) -> None:
    """Wait for ``child``, and hand on the first signal that comes meanwhile."""
    passed_on = False
    while child.poll() is None:
        if stop.received and not passed_on:
            child.send_signal(stop.received)
            passed_on = True
        tick()
        with suppress(subprocess.TimeoutExpired):
            child.wait(POLL_SECONDS)


def _why_it_failed(status: int, log: Path, begin: int) -> str:
    """A sentence about a process that ended with ``status`` and wrote into ``log`` from ``begin`` on; empty for 0."""
    if status == 0:
        return ""
    lines = [line for line in log.read_bytes()[begin:].decode(errors="replace").splitlines() if line.strip()]
    sentences = [line.removeprefix("lisatune: ") for line in lines if line.startswith("lisatune: ")]
    if status == 2 and sentences:
        return sentences[-1]
    if status < 0:
        hint = ", as the system does when memory runs out" if status == -9 else ""
        return f"the process was ended by signal {-status}{hint}"
    last = f": {lines[-1]}" if lines else ""
    return f"the process ended with status {status}{last} (all of it in runs/{log.name})"


def compare(
    given: Mapping[str, Any],
    output: Path,
    *,
    console: Console | None = None,
    memory_bytes: int | None = None,
    retry: bool = False,
    drop_models: bool = False,
    run_one: Runner = run_in_child,
) -> dict[str, Any]:
    """Run what is left of the grid ``given``, and put its numbers side by side.

    Args:
        given: What ``read_grid`` returned; without a model, the comparison that ``output`` holds goes on.
        output: Folder of the comparison. One that is there goes on: finished runs are not run again, a stopped one goes on
            from its checkpoint. The grid may have grown; runs that it no longer holds are refused, since results would
            be chosen after they are known.
        console: Where to tell how it goes; stderr by default.
        memory_bytes: The peak at which memory counts as equal; by default that of the smallest contender.
        retry: Run again what has failed.
        drop_models: Remove the weights and checkpoints of each run that is finished; its numbers stay.
        run_one: Trains one run.
    Returns: What is also in ``comparison.json``; see ``results``.
    Raises: UserError for whatever the user can mend; Stopped if SIGINT or SIGTERM came, after the run has saved.
    """
    console = console or Console(stderr=True)

    # the grid: the one given, or the one that the folder holds
    record = output / "comparison.yaml"
    if not given:
        if not record.is_file():
            raise UserError(f"{output} holds no comparison to resume: give --model, --data and a grid")
        given = read_grid(str(record), [])
    _check_folder(output, record)
    known = {identity(build_config(read_settings(str(path), []))): path.stem for path in _run_files(output)}
    before = _read_json(output / "comparison.json")
    failed = {} if retry else {r["name"]: r["failure"] for r in before.get("runs", []) if r.get("failure")}
    ended = _Ended(output / "runs", failed)
    grid = make_grid(given, output, known, ended.loss_of)
    if retry and grid.planned > len(grid.trials):
        raise UserError(
            "--retry cannot go with search=optuna, because later values depend on which runs failed: leave it out"
        )
    _refuse_other(grid, known, record)

    # what can be found wrong before the first run
    data = _check_inputs(grid, before)
    (output / "runs").mkdir(parents=True, exist_ok=True)

    # all runs that are left, one after the other; each has its settings in a file of its own
    with only_run(output), stop_signals() as stop:
        write_whole(record, yaml.safe_dump(grid.given, sort_keys=False, allow_unicode=True))
        session = _Session(
            grid, output, ended, data, memory_bytes, stop, partial(make_grid, given, output, known, ended.loss_of)
        )
        session.write_settings()
        session.publish()
        _run_all(session, console, run_one, drop_models)
        result = session.publish()
    _write_page(output, console)
    return result


def _check_folder(output: Path, record: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file: choose a folder")
    if output.is_dir() and any(p.name != "run.lock" for p in output.iterdir()) and not record.is_file():
        raise UserError(f"output folder {output} is not empty, and holds no comparison: choose another")
    parent = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise UserError(f"output folder {output} cannot be made in {parent}: choose a place where you may write")


def _run_files(output: Path) -> list[Path]:
    return sorted((output / "runs").glob("*.yaml"))


def _refuse_other(grid: Grid, known: Mapping[str, str], record: Path) -> None:
    """Refuse a grid that leaves out runs which ``record`` holds."""
    now = {identity(trial.config) for trial in grid.trials}
    missing = [name for key, name in known.items() if key not in now]
    if not missing:
        return
    was = read_grid(str(record), [])
    names = [n for n in dict.fromkeys([*was, *grid.given]) if was.get(n) != grid.given.get(n)]
    changes = "; ".join(f"{n}={grid.given.get(n, 'not given')} (was {was.get(n, 'not given')})" for n in names)
    raise UserError(
        f"{record.parent} holds a comparison of {len(known)} runs, and this grid lacks {len(missing)} of them: {changes or 'defaults'}. Put "
        "back what has changed (you may add values), or choose another output"
    )


def _check_inputs(grid: Grid, before: Mapping[str, Any]) -> str:
    """Whatever can be found wrong before the first run; what the data are recognised by."""
    first = grid.trials[0].config
    check_model_name(first.model)
    for trial in grid.trials:
        check_num_layers(trial.config)
    train, held_out = read_examples(first)
    rows = [example for part in train for example in part.examples or ()]
    sets: Any = {name: list(some) for name, some in held_out.items()}
    sets = sets.get("", sets)  # the one set itself, if it has no name
    digest = hashlib.sha256(repr((rows, sets)).encode()).hexdigest()[:16]
    count = f"{len(rows):,} rows to train on, " if rows else ""
    data = f"{count}{sum(map(len, held_out.values())):,} held out ({digest})"
    if before.get("data", data) != data:
        raise UserError(
            f"the data have changed since the comparison began: {data} (was {before['data']}). Put the old data back, or "
            "choose another output"
        )
    return data


@dataclass
class _Ended:
    """What became of the runs in ``folder``: their numbers, or why they failed."""

    folder: Path
    failed: dict[str, str]
    measured: dict[str, Measured] = field(default_factory=dict)

    def look(self, name: str) -> None:
        """See whether the run ``name`` has ended meanwhile."""
        if name not in self.measured and (found := read_run(self.folder / name)) is not None:
            self.measured[name] = found
            self.failed.pop(name, None)

    def loss_of(self, name: str) -> float | None:
        """The loss of the run ``name``, infinite if it failed; None if it has not ended."""
        self.look(name)
        if name in self.measured:
            return self.measured[name].loss
        return math.inf if name in self.failed else None


@dataclass
class _Session:
    grid: Grid
    folder: Path
    ended: _Ended
    data: str
    memory_bytes: int | None
    stop: StopSignal
    remade: Callable[[], Grid]

    def left(self) -> list[Trial]:
        """The runs that have not ended. If all have, a search by optuna says what comes next."""
        left = [trial for trial in self.grid.trials if self.ended.loss_of(trial.name) is None]
        if left or len(self.grid.trials) == self.grid.planned:
            return left
        self.grid = self.remade()
        self.write_settings()
        return self.left()

    def write_settings(self) -> None:
        """Write the settings of each run into a file of its own, which the process that trains it reads."""
        for trial in self.grid.trials:
            path = self.folder / "runs" / f"{trial.name}.yaml"
            if not path.exists():
                settings = trial.config.model_dump(exclude_unset=True)
                write_whole(path, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))

    def publish(self) -> dict[str, Any]:
        """Write comparison.json of what there is."""
        for trial in self.grid.trials:
            self.ended.look(trial.name)
        result = results(self.grid, self.ended.measured, self.ended.failed, memory_bytes=self.memory_bytes)
        result = {"data": self.data, "made_with": _made_with()} | result
        text = json.dumps(result, indent=1)
        write_whole(self.folder / "comparison.json", text + "\n")
        loaded: dict[str, Any] = json.loads(text)  # what is returned is what is written: keys are strings
        return loaded


def _run_all(session: _Session, console: Console, run_one: Runner, drop_models: bool) -> None:
    folder, stop, num_runs = session.folder, session.stop, session.grid.planned
    left = session.left()
    num_left = num_runs - len(session.grid.trials) + len(left)
    how_many = f"{num_runs} runs" + (f", {num_left} left" if num_left < num_runs else "")
    console.print(f"{len(session.grid.contenders())} contenders: {how_many}", highlight=False)
    if not left:
        return

    # one after the other; a signal stops the run that is under way, which saves itself, and then the comparison
    with _progress(num_runs, num_left, console) as show:
        while left:
            trial, *left = left
            run = folder / "runs" / trial.name
            _wait_for(run, stop, partial(show, trial, waits=True))
            failure = ""
            if not stop.received:
                failure = run_one(trial, folder, stop, partial(show, trial))
            if stop.received and finished(run) is None:
                number = stop.received
                done = len(session.publish()["finished"])
                raise Stopped(
                    f"stopped after {done} of {num_runs} runs; resume with: "
                    f"lisatune compare --output {shlex.quote(str(folder))}",
                    number,
                )
            if failure:
                session.ended.failed[trial.name] = failure
                warn(console, f"{trial.name} failed: {failure}")
            elif drop_models:
                _drop_models(run)
            session.publish()
            show(None)
            left = left or session.left()


def _wait_for(run: Path, stop: StopSignal, tick: Callable[[], None]) -> None:
    """Wait while another process holds ``run``: a child that outlived a comparison which was killed."""
    while run.is_dir() and not stop.received:
        try:
            with only_run(run):
                return
        except UserError:
            tick()
            time.sleep(POLL_SECONDS)


def _drop_models(run: Path) -> None:
    for name in ("model", "adapter", "checkpoints"):
        shutil.rmtree(run / name, ignore_errors=True)


def _share_done(trial: Trial) -> float:
    """How much of a run is done, by the last line of its metrics."""
    try:
        with (Path(trial.config.output) / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            step = json.loads(file.read().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return 0.0
    return min(1.0, step / trial.config.max_steps) if trial.config.max_steps else 0.0


@contextmanager
def _progress(num_runs: int, num_left: int, console: Console) -> Iterator[Callable[..., None]]:
    """A bar over the runs; call it with the run that goes on, or with None when one has ended."""
    columns = (
        TextColumn("run"), MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.fields[now]}", markup=False),
        TimeElapsedColumn(), TextColumn("{task.fields[left]}"),
    )  # fmt: skip
    ended, begun = 0, time.monotonic()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("runs", total=num_runs, completed=num_runs - num_left, now="", left="")

        def show(trial: Trial | None, *, waits: bool = False) -> None:
            nonlocal ended
            ended += trial is None
            share = 0.0 if trial is None else _share_done(trial)
            done = ended + share
            seconds = (time.monotonic() - begun) / done * (num_left - done) if done > 0.02 else None
            left = (
                ""
                if seconds is None
                else f"left {int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"
            )
            now = "" if trial is None else f"{trial.name} {share:.0%}"
            if waits and trial is not None:
                now = f"{trial.name}, which another process still trains"
            bar.update(task, completed=num_runs - num_left + ended, now=now, left=left)

        yield show


def _made_with() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        **{name: version(name) for name in ("lisatune", "torch", "transformers")},
    }


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it, and it is made again from the runs") from error
    return loaded


def _write_page(folder: Path, console: Console) -> None:
    try:
        from lisatune.compare.page import write_comparison
    except ImportError:
        tell(console, f"no report.html, which {NEEDS_MATPLOTLIB}")
        return
    write_comparison(folder)
