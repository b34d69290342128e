"""Bad input by the million: row formats, config and checkpoint reader under a coverage-guided fuzzer.

python benchmarks/fuzz.py [--cases 1000000] [--target all] [--seed 0] [--keep FOLDER]

Needs atheris (pip install atheris; Apache-2.0, not built for every platform), which watches the branches of lisatune's
code and breeds inputs that take new ones. Inputs and what must hold for them are those of tests/helpers/hostile.py: files of rows
(JSON, JSON lines, gzip) read, recognised and tokenized; config files and key=value words; checkpoints that are damaged, or
forged and signed anew. Anything but a UserError that escapes, a row that is not accounted for, and a file read or written
where it should not be, counts as a traceback and is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results import markdown, write_page

TARGETS = {"rows": ["lisatune"], "config": ["lisatune", "yaml"], "checkpoint": ["lisatune"]}  # to what is watched
SHARES = {"rows": 0.9, "config": 0.02, "checkpoint": 0.08}  # of all cases; a config takes ten times as long as a row
LONGEST = 600  # bytes of an input
LINE = re.compile(rb"#(\d+)\s+\w+\s+cov: (\d+) ft: (\d+)")  # of libFuzzer's log


class Outcomes:
    """What became of the cases of one target; tracebacks are told apart by their kind and place."""

    def __init__(self, cases: int, folder: Path) -> None:
        self.cases = cases
        self.folder = folder
        self.counts: Counter[str] = Counter()
        self.tracebacks: Counter[str] = Counter()

    def run(self, case: Callable[[], str], data: bytes) -> None:
        """Take one case, unless there were enough."""
        done = self.counts.total() + self.tracebacks.total()
        if done >= self.cases:
            return
        try:
            self.counts[case()] += 1
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}"
            if kind not in self.tracebacks:
                (self.folder / f"traceback-{len(self.tracebacks)}").write_bytes(data)
                traceback.print_exc(file=sys.stdout)
            self.tracebacks[kind] += 1
        if (done + 1) % 1000 == 0 or done + 1 == self.cases:
            found = {"counts": self.counts, "tracebacks": self.tracebacks}
            (self.folder / "outcomes.json").write_text(json.dumps(found))


def fuzz(target: str, cases: int, seed: int, folder: Path) -> None:
    """Fuzz one target in this process, which libFuzzer ends."""
    import atheris

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
    with atheris.instrument_imports(include=TARGETS[target]):
        import forged
        import hostile

    class Bytes(hostile.Pick):
        """Choices taken from the fuzzer's bytes."""

        def __init__(self, data: bytes) -> None:
            self.provider = atheris.FuzzedDataProvider(data)

        def integer(self, low: int, high: int) -> int:
            return int(self.provider.ConsumeIntInRange(low, high))

        def raw(self, most: int) -> bytes:
            return bytes(self.provider.ConsumeBytes(self.integer(0, most)))

    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as place:
        case = {"rows": _rows, "config": _config, "checkpoint": _checkpoint}[target](hostile, forged, Path(place))
        outcomes = Outcomes(cases, folder)
        seeds = folder / "corpus"
        seeds.mkdir()
        for number in range(100):
            (seeds / f"seed-{number}").write_bytes(random.Random(f"{seed}/{number}").randbytes(LONGEST))
        options = [
            f"-runs={cases + 10}",
            f"-seed={seed + 1}",
            f"-max_len={LONGEST}",
            "-timeout=60",
            "-print_final_stats=1",
        ]
        atheris.Setup(
            [sys.argv[0], *options, str(seeds)], lambda data: outcomes.run(lambda: case(Bytes(data), data), data)
        )
        atheris.Fuzz()


def _rows(hostile: Any, forged: Any, place: Path) -> Callable[[Any, bytes], str]:
    from lisatune.data.tokenize import Encoder
    from tiny import make_tokenizer

    tokenizer = make_tokenizer()

    def case(pick: Any, data: bytes) -> str:
        if pick.chance(4):
            columns = hostile.row(pick)
            return str(hostile.try_row(columns)) if isinstance(columns, dict) else "no row"
        name, content = (pick.one_of(["rows.jsonl", "rows.json"]), data) if pick.chance(4) else hostile.row_file(pick)
        (place / name).write_bytes(content)
        return str(hostile.try_rows(place / name, lambda: Encoder(tokenizer, 40)))

    return case


def _config(hostile: Any, forged: Any, place: Path) -> Callable[[Any, bytes], str]:
    from lisatune.layers import find_layers
    from tiny import make_llama

    layers = find_layers(make_llama())

    def case(pick: Any, data: bytes) -> str:
        given = ({}, [], data) if pick.chance(4) else hostile.settings(pick)
        return str(hostile.try_settings(*given, place, layers))

    return case


def _checkpoint(hostile: Any, forged: Any, place: Path) -> Callable[[Any, bytes], str]:
    small, real = forged.small_files(), forged.real_files()

    def case(pick: Any, data: bytes) -> str:
        if pick.chance(200):  # dear, because a model is built
            return str(forged.try_forged(pick, real, place))
        folder = hostile.copy_checkpoint(small, place / "run")
        hostile.damage(pick, folder)
        return str(hostile.try_checkpoint(folder, small))

    return case


def run_target(target: str, cases: int, seed: int, keep: Path | None) -> dict[str, Any]:
    """Fuzz one target in a process of its own, and read what it left behind."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) if keep is None else keep / target
        folder.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        words = [sys.executable, __file__, "--child", str(folder), "--target", target, "--cases", str(cases)]
        with (folder / "log").open("wb") as log:
            status = subprocess.run([*words, "--seed", str(seed)], stderr=log, check=False).returncode
        seconds = time.perf_counter() - begin
        log_text = (folder / "log").read_bytes()
        lines = [tuple(map(int, match)) for match in LINE.findall(log_text)]
        if status or not lines:
            sys.exit(f"{target}: the fuzzer ended with status {status}: {log_text[-2000:].decode(errors='replace')}")
        found = json.loads((folder / "outcomes.json").read_text())
        return found | {"first": lines[0], "last": lines[-1], "seconds": seconds}


def as_tables(found: dict[str, dict[str, Any]]) -> str:
    """One row a target, then what became of the cases."""
    rows = []
    for target, one in found.items():
        cases = sum(one["counts"].values()) + sum(one["tracebacks"].values())
        (_, cov, ft), (_, last_cov, last_ft) = one["first"], one["last"]
        reached = [f"{cov:,}, {last_cov:,}", f"{ft:,}, {last_ft:,}"]
        rows.append([target, f"{cases:,}", *reached, f"{one['seconds'] / 60:.0f}", sum(one["tracebacks"].values())])
    head = ["target", "cases", "branches reached: first input, last", "features: first, last", "minutes", "tracebacks"]
    parts = [markdown(head, rows)]
    for target, one in found.items():
        became = [[kind, f"{count:,}"] for kind, count in Counter(one["counts"]).most_common()]
        became += [[f"**traceback**: {kind}", f"{count:,}"] for kind, count in one["tracebacks"].items()]
        parts += [f"## {target}", markdown(["what became of it", "cases"], became)]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000, help="of all targets together")
    parser.add_argument("--target", choices=[*TARGETS, "all"], default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for logs, corpus, and inputs that gave tracebacks")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        import atheris  # noqa: F401
    except ImportError:
        sys.exit("fuzzing needs the package atheris, which is not built for every platform: pip install atheris")
    if options.child:
        fuzz(options.target, options.cases, options.seed, options.child)
        return
    targets = list(TARGETS) if options.target == "all" else [options.target]
    cases = {t: round(options.cases * SHARES[t]) if len(targets) > 1 else options.cases for t in targets}
    found = {t: run_target(t, cases[t], options.seed, options.keep) for t in targets}
    print(write_page("fuzz", as_tables(found), __doc__ or ""))
    sys.exit(any(one["tracebacks"] for one in found.values()))


if __name__ == "__main__":
    main()
