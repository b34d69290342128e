"""Layer norms of LoRA, full fine-tuning and LISA on a real model, before and after the value of step 0 is taken away.

python benchmarks/norms.py [--model DIR] [--data FILE] [--runs runs/norms] [--steps 150]

The paper's motivation (arXiv:2403.17919) is that mean weight norms of LoRA's layers are skewed towards embedding and
head. This repeats it with the paper's set-up for its smallest model (GPT2-small: LoRA of rank 128 on every linear layer,
embedding and head; learning rates 6e-4, 3e-4 and 6e-4, LISA with gamma 2), one line of norms for each step, so that the
mean is the paper's, and puts beside it what untrained adapters have, and how far the weights really moved. Finished
runs are not repeated.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from pathlib import Path
from typing import Any

from results import HERE, SHARED, lisatune, markdown, write_page

from lisatune.study.study import SKEWED, NormRun, draw, read_norms, study, tables

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"method": "lora", "lora_r": 128, "lora_alpha": 32, "lora_target_modules": [*LINEAR, "embed_tokens", "lm_head"]}
RUNS: dict[str, dict[str, Any]] = {
    "LoRA": LORA | {"learning_rate": 6e-4},
    "full": {"method": "full", "learning_rate": 3e-4},
    "LISA": {"method": "lisa", "num_active": 2, "interval_steps": 10, "learning_rate": 6e-4},
}

LIMITS = """**What this does not show.** One small model, one seed, one learning rate a method, taken from the paper and not
searched for. The data are far from what the model knows, so that what changes first is which tokens are likely at all: where
the stable rank of embedding or head is near 1, nearly all of its change lies in one direction. That decoder layers move less
is no proof that they matter less. And LoRA's change depends on how its adapters are made, not on the layers alone: peft
draws the embedding's B with deviation 1 and a linear layer's A within 1/sqrt(width), so that equal steps of Adam make
unequal changes, from the first update on ("change of the weights at first")."""


def record(folder: Path, settings: dict[str, Any], options: argparse.Namespace) -> None:
    """Train with a line of norms for each step."""
    common = {
        "norm_steps": 1, "max_steps": options.steps, "max_length": 128, "per_device_train_batch_size": 4, "eval_rows": 64,
        "warmup_steps": 10, "device": "cpu", "seed": 0,
    }  # fmt: skip
    words = [f"{name}={json.dumps(value)}" for name, value in (common | settings).items()]
    lisatune("train", "--resume", "--model", options.model, "--data", options.data, "--output", folder, *words)


def report(options: argparse.Namespace) -> Path:
    """Tables, verdicts and figures of all runs."""
    folders = [options.runs / name for name in RUNS]
    runs = [read_norms(folder) for folder in folders]
    told = study(runs)
    *of_runs, skewness = [_titled(*table) for table in tables(told)]
    text = [
        f"{Path(options.model).resolve().parent.name}, Alpaca: {options.steps} steps of 4 rows of at most 128 tokens, "
        "10 steps of warm-up, then linearly to 0, AdamW, float32, seed 0; a line of norms for each step. LoRA: rank 128, "
        "alpha 32, seven linear modules a layer, embedding and head. The model's embedding and head are one tensor: in "
        "full and LISA it is the embedding's, in LoRA each has adapters of its own.",
        "## Answer",
        _answer(told),
        *(verdict for verdict in (*(run["verdict"] for run in told["runs"]), told["verdict"])),
        LIMITS,
        "## Is it the initialisation?",
        _initialisation(runs[0], json.loads((Path(options.model) / "config.json").read_text())),
        skewness,
    ]
    figures = {
        "side-by-side": ("side by side", runs),
        "heat-lora": ("heat maps", runs[:1]),
        "heat-lisa": ("heat maps", runs[2:]),
    }
    for name, (kind, some) in figures.items():
        figure = HERE / "results" / f"{datetime.date.today().isoformat()}-norms-{name}.svg"
        figure.write_text(draw(kind, some).replace("currentColor", "#808080"), encoding="utf-8")  # a page may be dark
        text.append(f"![{name}]({figure.name})")
    text += ["## Each run", *of_runs, "## Loss and cost", _losses(folders)]
    return write_page("norms", "\n\n".join(text), __doc__ or "")


def _answer(told: dict[str, Any]) -> str:
    """Is the skewness there once step 0 is taken away? In words that the numbers choose."""
    of = {run["method"]: {m: s["ratio"] for m, s in run["skewness"].items()} for run in told["runs"]}
    largest = {run["method"]: run["skewness"]["relative_change"]["largest"] for run in told["runs"]}
    trained, untrained = (of["lora"][m] / of["full"][m] for m in ("mean_norm", "start"))
    same = "is that of untrained weights" if abs(trained / untrained - 1) < 0.05 else "is not that of untrained weights"
    lines = [
        f"**The difference that the paper plots {same}.** By its quantity LoRA is {trained:.2g} times as skewed as full "
        f"fine-tuning, and {untrained:.2g} times before the first step of either."
    ]
    for method, name in (("lora", "LoRA"), ("full", "full fine-tuning")):
        ratio = of[method]["relative_change"]
        lines.append(
            f"**{name}: once step 0 is taken away, skewness is {'there' if ratio >= SKEWED else 'not there'}.** The largest part "
            f"({largest[method]}) moved {ratio:.2g} times as far as the median decoder layer, both in relation to their "
            f"weights, {of[method]['change_per_weight']:.2g} times for each weight, and {of[method]['change']:.2g} times by plain norm."
        )
    return "\n\n".join(lines)


def _titled(title: str, heads: list[str], cells: list[list[str]]) -> str:
    return f"### {title}\n\n{markdown(heads, cells)}"


def _initialisation(lora: NormRun, config: dict[str, Any]) -> str:
    """Norms of adapters that nobody has trained, by peft's rules alone, beside what the run had."""
    rank, width = LORA["lora_r"], config["hidden_size"]
    rules = {
        "embedding": ("sqrt(width r)", math.sqrt(width * rank)),
        "layers.0": ("sqrt(7) sqrt(r / 3)", math.sqrt(7 * rank / 3)),
        "head": ("sqrt(r / 3)", math.sqrt(rank / 3)),
    }
    rows = []
    for part, (rule, value) in rules.items():
        first, last = lora.parts[part][0]["norm"], lora.parts[part][-1]["mean_norm"]
        rows.append([part, f"{rule} = {value:.2f}", f"{first:.2f}", f"{last:.2f}", f"{last / first - 1:.2%}"])
    heads = ["part", "by the rule of initialisation", "untrained adapters", "the paper's mean norm", "more by"]
    return _titled("adapters that were never trained, against the paper's quantity", heads, rows)


def _losses(folders: list[Path]) -> str:
    rows = []
    for folder in folders:
        told = json.loads((folder / "summary.json").read_text())
        losses = [f"{told[name]:.4f}" for name in ("eval_loss_before", "eval_loss_after")]
        rows.append([folder.name, *losses, f"{told['train_seconds']:.0f}"])
    return _titled("held-out loss of 64 rows", ["run", "before", "after", "s, recording too"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHARED / "models" / "stories15M" / "hf"))
    parser.add_argument("--data", default=str(SHARED / "data" / "alpaca" / "alpaca.jsonl.gz"))
    parser.add_argument("--runs", type=Path, default=Path("runs/norms"))
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    for name, settings in RUNS.items():
        if not (options.runs / name / "summary.json").exists():
            record(options.runs / name, settings, options)
    print(report(options))


if __name__ == "__main__":
    main()
