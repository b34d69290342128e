"""lisatune beside the tools that its users would pick instead: the same rows, model, precision and steps, by turns.

python benchmarks/peers.py FOLDER --model DIR [--envs FOLDER] [--tools ms-swift TRL] [--methods lisa] [--steps 15] [--rounds 2] [--minutes 60] [--json FILE]

Each tool gets an environment of its own below --envs, made by pip once, with the versions in ``peers_tools.py``. In each round and method lisatune
runs before, between and after the others. A run that is in FOLDER already is not repeated, so the command goes on where it
stopped. Rows are the first of GSM8K in shared/ beside the checkout, as many as the steps need. A tool that cannot be installed or
run is on the page with the first line of its error; with --retry it is tried again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import peers_tools
from peers_tools import TOOLS, Job, Tool
from results import HERE, SHARED, markdown, write_page

OURS = "lisatune"
METHODS = ("slices", "lisa", "lora", "full")
WARM = 2  # steps at the beginning that do not count
TICK = os.sysconf("SC_CLK_TCK")
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate")


# -- environments ----------------------------------------------------------------------------------------------------


def make_environment(name: str, tool: Tool, envs: Path) -> str:
    """Install ``tool`` below ``envs``, unless it is there; the first line of pip's error, or nothing."""
    folder, asked = envs / name, "\n".join(tool.requires or ())
    done = folder / "requirements.txt"
    if tool.requires is None or (done.is_file() and done.read_text() == asked):
        return ""
    print(f"{name}: installing", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin/python", "-m", "pip", "install", "--quiet"]
    steps = (
        [[*pip, "--no-deps", tool.requires[0]], [*pip, *tool.requires[1:]]] if tool.alone else [[*pip, *tool.requires]]
    )
    for words in steps:
        made = subprocess.run(words, stderr=subprocess.PIPE, text=True)
        if made.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            return first_error(made.stderr)
    done.write_text(asked)
    return ""


def versions(name: str, tool: Tool, envs: Path) -> dict[str, str]:
    """The versions in the environment of ``tool``, its own first."""
    own = [OURS] if tool.requires is None else [re.split(r"[\[=]", tool.requires[0])[0]]
    code = (
        "import sys, json\nfrom importlib.metadata import version, PackageNotFoundError\nfound = {}\n"
        "for name in sys.argv[1:]:\n try: found[name] = version(name)\n except PackageNotFoundError: pass\nprint(json.dumps(found))"
    )
    python = sys.executable if tool.requires is None else str(envs / name / "bin/python")
    told = subprocess.run([python, "-c", code, *own, *PACKAGES], stdout=subprocess.PIPE, text=True, check=True).stdout
    return dict(json.loads(told))


def first_error(text: str) -> str:
    """The line of an output that says what went wrong: the first that names an error, else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(ERROR|error|[\w.]*(Error|Exception))\b.*[:!]", line)]
    return (named or lines[-1:] or ["it printed nothing"])[0][:300]


# -- one run ---------------------------------------------------------------------------------------------------------


def processes_of(process: int) -> Iterator[int]:
    """``process`` and all that it has started and that still run."""
    waiting = [process]
    while waiting:
        number = waiting.pop()
        yield number
        try:
            for thread in Path(f"/proc/{number}/task").iterdir():
                waiting += map(int, (thread / "children").read_text().split())
        except OSError:  # it has just ended
            continue


def processor_seconds(process: int) -> float:
    """What ``process`` has computed so far, with all that it has started."""
    ticks = 0
    for number in processes_of(process):
        try:
            fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(map(int, fields[11:15]))  # user, system, and those of children that have ended
    return ticks / TICK


def run(tool: Tool, job: Job, threads: int) -> dict[str, Any]:
    """One run: when each step was told of, by wall and processor, losses, the most memory, and the times before and after."""
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    words, log, printed = tool.command(job), job.folder / tool.log, job.folder / "output.txt"
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "AXOLOTL_DO_NOT_TRACK": "1",
        "CUDA_VISIBLE_DEVICES": "", "PATH": f"{job.bin}:{os.environ['PATH']}", "TOKENIZERS_PARALLELISM": "false",
        "HF_HOME": str(job.folder / "hf"), "PYTHONPATH": str(HERE.parent / "src" if tool.requires is None else job.folder),
    }  # fmt: skip
    loss = re.compile(tool.loss + r"([\d.eE+-]+)")
    begun, marks, losses = time.monotonic(), list[tuple[float, float]](), list[float]()
    with printed.open("w") as output:
        started = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=job.folder)  # fmt: skip
        ended, read = 0, 0
        while not ended:
            time.sleep(0.05)
            ended, status, usage = os.wait4(started.pid, os.WNOHANG)
            if log.is_file() and log.stat().st_size != read:
                read = log.stat().st_size
                losses = [float(found) for found in loss.findall(log.read_text(errors="replace"))]
                if not ended:
                    marks += [(time.monotonic() - begun, processor_seconds(started.pid))] * (len(losses) - len(marks))
    started.returncode = os.waitstatus_to_exitcode(status)
    wall, processor = time.monotonic() - begun, usage.ru_utime + usage.ru_stime
    shutil.rmtree(job.folder / "hf", ignore_errors=True)
    if started.returncode or len(losses) < job.steps:
        return {"error": first_error(printed.read_text(errors="replace"))}
    losses, marks = losses[: job.steps], marks[: job.steps]
    shutil.rmtree(job.folder / "out", ignore_errors=True)
    shutil.rmtree(job.folder / "run" / "model", ignore_errors=True)
    return {
        "marks": marks,
        "losses": losses,
        "peak_bytes": 1024 * usage.ru_maxrss,
        "wall": wall,
        "processor": processor,
    }


# -- all runs --------------------------------------------------------------------------------------------------------


def turns(method: str, tools: Sequence[str], rounds: int) -> Iterator[tuple[str, str]]:
    """Tools and the names of their runs: lisatune before, between and after the others."""
    others = [name for name in tools if name != OURS and method in TOOLS[name].methods]
    half = (len(others) + 1) // 2
    order = (
        [OURS, *others[:half], OURS, *others[half:], *([OURS] if others[half:] else [])] if OURS in tools else others
    )
    for number in range(rounds):
        for place, name in enumerate(order):
            yield name, f"{method}-{number}-{order[:place].count(name)}-{name}"


def write_rows(folder: Path, number: int) -> Path:
    """The first rows of GSM8K as chats."""
    path = folder / "rows.jsonl"
    with gzip.open(SHARED / "data/gsm8k/train.jsonl.gz", "rt", encoding="utf-8") as file:
        given = [json.loads(line) for _, line in zip(range(number), file, strict=False)]
    chats = (
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in given
    )
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    return path


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Environments, then what is not measured yet, while there is time; ``runs`` by method and tool, versions, errors."""
    begun = time.monotonic()
    given.folder.mkdir(parents=True, exist_ok=True)
    rows = write_rows(given.folder, given.steps * peers_tools.ROWS)
    errors = {name: make_environment(name, TOOLS[name], given.envs) for name in given.tools}
    usable = [name for name in given.tools if not errors[name]]
    found: dict[str, Any] = {"runs": {}, "errors": {(name, ""): text for name, text in errors.items() if text}}
    for method in given.methods:
        for name, label in turns(method, usable, given.rounds):
            kept = given.folder / f"{label}.json"
            if not kept.is_file() or (given.retry and "error" in json.loads(kept.read_text())):
                if time.monotonic() - begun >= 60 * given.minutes:
                    continue
                job = Job((given.envs / name / "bin").absolute(), (given.folder / label).absolute(), given.model.absolute(), rows.absolute(), method, given.steps)  # fmt: skip
                kept.write_text(json.dumps(run(TOOLS[name], job, given.threads)))
            one = json.loads(kept.read_text())
            if "error" in one:
                found["errors"][name, method] = one["error"]
            else:
                found["runs"].setdefault((method, name), []).append(one)
            print(
                label,
                one.get("error") or f"{step_of([one], 1):.2f} processor seconds a step",
                file=sys.stderr,
                flush=True,
            )
        for name in usable:
            if method in TOOLS[name].methods and (method, name) not in found["runs"]:
                found["errors"].setdefault((name, method), "not run yet")
    found["versions"] = {name: versions(name, TOOLS[name], given.envs) for name in usable}
    return found


# -- the page --------------------------------------------------------------------------------------------------------


def step_of(runs: Sequence[dict[str, Any]], kind: int) -> float:
    """Median seconds of a step, by wall (0) or processor (1), of all runs together."""
    return median(
        after[kind] - before[kind]
        for one in runs
        for before, after in zip(one["marks"][WARM - 1 :], one["marks"][WARM:], strict=False)
    )


def summary(runs: Sequence[dict[str, Any]], tokens: tuple[int, int], steps: int) -> dict[str, float]:
    """The numbers of a tool in a method: medians of its runs; ``tokens`` are all and labelled ones of all steps."""
    return {
        "runs": len(runs), "step_processor": step_of(runs, 1), "step_wall": step_of(runs, 0),
        "lowest_run": min(step_of([one], 1) for one in runs), "highest_run": max(step_of([one], 1) for one in runs),
        "tokens_per_second": tokens[0] / steps / step_of(runs, 1), "labelled_per_second": tokens[1] / steps / step_of(runs, 1),
        "peak_bytes": median(one["peak_bytes"] for one in runs),
        # the first step is told of when it is over, so a usual step is taken off
        "start": median(one["marks"][0][1] for one in runs) - step_of(runs, 1),
        "end": median(one["processor"] - one["marks"][-1][1] for one in runs),
        "whole": median(one["processor"] for one in runs), "whole_wall": median(one["wall"] for one in runs),
        "mean_loss": median(sum(one["losses"]) / len(one["losses"]) for one in runs),
        "first_loss": median(one["losses"][0] for one in runs), "last_loss": median(one["losses"][-1] for one in runs),
    }  # fmt: skip


COLUMNS = {
    "runs": "{:.0f}", "step_processor": "{:.2f}", "step_wall": "{:.2f}", "tokens_per_second": "{:,.0f}", "labelled_per_second": "{:,.0f}",
    "peak_bytes": "{:,.0f}", "start": "{:.1f}", "end": "{:.1f}", "whole": "{:.0f}", "first_loss": "{:.3f}", "mean_loss": "{:.3f}",
}  # fmt: skip
HEAD = ["tool", "runs", "step, processor s", "of the runs", "step, wall s", "tokens/s", "labelled/s", "peak MiB", "start s", "end s",
        "whole s", "first loss", "mean loss"]  # fmt: skip
BEST = ("step_processor", "peak_bytes", "start", "end", "whole")  # the least of these is bold


def table(of_tool: dict[str, dict[str, float]]) -> str:
    """A row for each tool, the quickest first; the best of a column in bold."""
    rows = []
    for name, numbers in sorted(of_tool.items(), key=lambda item: item[1]["step_processor"]):
        shown = numbers | {"peak_bytes": numbers["peak_bytes"] / 2**20}
        cells = []
        for column, form in COLUMNS.items():
            best = column in BEST and numbers[column] == min(other[column] for other in of_tool.values())
            cells.append(f"**{form.format(shown[column])}**" if best else form.format(shown[column]))
        cells.insert(2, f"{numbers['lowest_run']:.2f} to {numbers['highest_run']:.2f}")
        rows.append([name, *cells])
    return markdown(HEAD, rows)


def page(found: dict[str, Any], given: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The page's text, and its numbers."""
    tokens = counted(given)
    numbers: dict[str, dict[str, Any]] = {}
    for (method, name), runs in found["runs"].items():
        numbers.setdefault(method, {})[name] = summary(runs, tokens, given.steps)
    text = ABOUT.format(
        steps=given.steps, rows=peers_tools.ROWS, longest=peers_tools.TOKENS, warm=WARM, rounds=given.rounds, tokens=tokens[0],
        labelled=tokens[1], threads=given.threads,
    )  # fmt: skip
    for method, of_tool in numbers.items():
        text += f"\n\n## {TITLES[method]}\n\n{table(of_tool)}"
    text += "\n\n## Tools\n\n"
    shown = [
        [name, ", ".join(f"{k} {v}" for k, v in has.items()), TOOLS[name].note]
        for name, has in found["versions"].items()
    ]
    text += markdown(["tool", "versions", "to know"], shown)
    failed = "\n".join(
        f"- {name}{f', {method}' if method else ', installing'}: `{told}`"
        for (name, method), told in found["errors"].items()
    )
    text += f"\n\nNot measured:\n\n{failed}" if failed else ""
    return f"{text}\n\n{NOTES}", numbers


def counted(given: argparse.Namespace) -> tuple[int, int]:
    """Tokens of all steps, and those of them that are learned, as lisatune counts the rows for everybody."""
    from rich.console import Console

    from lisatune.data.examples import read_examples
    from lisatune.models.load import load_tokenizer
    from lisatune.run.data import Encoding
    from lisatune.settings import build_config

    config = build_config({"model": str(given.model), "data": str(given.folder / "rows.jsonl"), "output": "-", "max_length": peers_tools.TOKENS})  # fmt: skip
    encoding = Encoding(config, load_tokenizer(config.model)[0], None, Console(quiet=True))
    _, counts = encoding.documents(read_examples(config)[0][0], "train")
    return counts.tokens, counts.labelled_tokens


TITLES = {
    "slices": "lisatune's default: a slice of every matrix each step",
    "lisa": "LISA of the paper: 2 layers for 5 steps, embedding and head",
    "lora": "LoRA, rank 16",
    "full": "Full fine-tuning",
}
ABOUT = (
    "{steps} steps of {rows} rows of at most {longest} tokens in float32 with {threads} thread, {rounds} rounds at most. In each, lisatune ran before, between and "
    "after the others. There were {tokens:,} tokens, {labelled:,} of them learned, counted alike for all. Other work ran on the machine, several runs of this page "
    "too, so processor seconds count: they are what is compared. Wall seconds have the other work in them. A step is the median of all steps but the "
    "first {warm}, of all runs; \"of the runs\" is the least and the greatest median of a run. Tokens/s are by processor seconds. Peak is the resident memory of the "
    "largest process. Start is until the first step, end is from the last step to the exit with the model saved, whole is all of it: processor seconds. "
    "Equal first losses mean equal batches and labels. Where they differ, so does what is learned, and losses do not compare."
)  # fmt: skip
NOTES = """## What to know

- The losses say what is equal. torchtune's batches and labels are lisatune's. The others differ by a label a row, or by the rows of a batch.
- lisatune's own runs show the noise: compare the column "of the runs". Wall seconds have too much of it to be compared.
- Why a tool is slower was not taken apart here. lisatune makes the logits of learned tokens alone, a part at a time.
- axolotl had its turn at the same time as other tools, not between two runs of lisatune. One model on one processor says little of
  others, and nothing of a GPU.
- LMFlow is not here. Its package is of 2023, before LISA; the LISA that it has needs a checkout."""


def main() -> None:
    """Measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="Where runs and their numbers are kept.")
    parser.add_argument("--model", type=Path, required=True, help="Folder of SmolLM2-135M-Instruct.")
    parser.add_argument("--envs", type=Path, default=Path("peers"), help="Folder of the environments.")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=600, help="Begin no run after so many; with 0 the page alone is written.")  # fmt: skip
    parser.add_argument("--retry", action="store_true", help="Run again what has failed.")
    parser.add_argument("--json", type=Path, help="Write the numbers to this file.")
    given = parser.parse_args()
    found = measure(given)
    text, numbers = page(found, given)
    if given.json:
        given.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    print(write_page("peers", text, __doc__ or "").read_text())


if __name__ == "__main__":
    main()
