"""`lisatune train`."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from lisatune.cli.common import (
    MACHINE,
    OUTPUT,
    AsJson,
    ConfigFile,
    DataName,
    ModelName,
    Overrides,
    check_host_memory,
    console,
    given,
    heavy_imports,
)
from lisatune.common.console import tell
from lisatune.errors import UserError
from lisatune.processes.launch import command, num_started, number_started, without_nproc

RESUME = "Stop and resume"


def train(
    overrides: Overrides = None,
    config: ConfigFile = None,
    model: ModelName = None,
    data: DataName = None,
    output: Annotated[str | None, typer.Option(help="Folder of the run.", rich_help_panel=OUTPUT)] = None,
    report_to: Annotated[
        str | None,
        typer.Option("--report-to", "--log-to", help="Trackers: wandb,tensorboard,...", rich_help_panel=OUTPUT),
    ] = None,
    as_json: AsJson = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume the run in the output folder, if there is one.", rich_help_panel=RESUME),
    ] = False,
    allow_changes: Annotated[
        bool,
        typer.Option(
            "--allow-changes",
            help="Resume although settings or data have changed. Needs --resume.",
            rich_help_panel=RESUME,
        ),
    ] = False,
    save_every: Annotated[
        str | None,
        typer.Option(
            metavar="N steps|minutes",
            help="How often to write a checkpoint. Default: 10 minutes.",
            rich_help_panel=RESUME,
        ),
    ] = None,
    keep: Annotated[
        int | None, typer.Option(metavar="N", help="How many checkpoints to keep.", rich_help_panel=RESUME)
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="MEMORY",
            help="Make the run fit into this memory, for example 24GiB. See: lisatune plan",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(
            metavar="MEMORY",
            help="With --fit: host memory that a process may take, for example 64GiB. Python and its libraries come on top.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="How many processes (GPUs) to start on this host. For several hosts use torchrun.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
) -> None:
    """Fine-tune a model on your data: with LISA, LoRA, or all weights.

    Ctrl-C writes a checkpoint and ends. To resume, add --resume to the same command.

    Example:
        lisatune train --model HuggingFaceTB/SmolLM2-135M --data rows.jsonl \\
            --output runs/a learning_rate=1e-3 max_steps=200 eval_rows=50
        lisatune train --config runs/a/config.yaml --output runs/b
    """
    from lisatune.common.amounts import parse_bytes
    from lisatune.common.equal_sums import ask_for_equal_sums
    from lisatune.run.preflight import preflight
    from lisatune.settings import build_config, read_settings

    # the settings, of which the options win
    settings = read_settings(config, overrides or [])
    settings |= given(model=model, data=data_of(data), output=output, report_to=report_to, save_total_limit=keep)
    settings |= {} if save_every is None else parse_period(save_every)
    checked = build_config(settings)
    memory_bytes = None if fit is None else parse_bytes(fit)
    host_bytes = None if host_memory is None else parse_bytes(host_memory)
    check_host_memory(host_bytes, memory_bytes, checked.device, "--fit")
    if allow_changes and not resume:
        raise UserError("--allow-changes has no effect without --resume: add it, or leave this out")
    resume = resume or offer_to_go_on(Path(checked.output))

    # this process becomes the one that starts the others
    if nproc is not None and num_started() == 1:
        words = command(nproc, without_nproc(sys.argv[1:]))
        os.execv(words[0], words)
    if checked.full_determinism:
        ask_for_equal_sums()  # before torch is loaded

    # mistakes are found before torch is imported; several processes have to meet before one of them may give up
    examples = preflight(checked, resume=resume) if num_started() == 1 else None
    with heavy_imports():
        from lisatune.train import train as train_run

    summary = train_run(
        checked,
        console=console,
        resume=resume,
        allow_changes=allow_changes,
        memory_bytes=memory_bytes,
        host_bytes=host_bytes,
        examples=examples,
    )

    # one of the processes reports
    if number_started() > 0:
        return
    if as_json:
        print(json.dumps(summary))
    else:
        print_summary(summary, checked.output)


def data_of(given: str | None) -> Any:
    """``--data``: a name, or a list of data sets with their shares, written as in a file of settings."""
    from lisatune.settings import read_settings

    is_list = given is not None and given.lstrip().startswith("[")
    return read_settings(None, [f"data={given}"])["data"] if is_list else given


def parse_period(text: str) -> dict[str, float]:
    """``100 steps`` or ``10 minutes`` as settings."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(steps?|minutes?)\s*", text)
    if match is None:
        raise UserError(f"--save-every '{text}' is not a period: write for example '100 steps' or '10 minutes'")
    return {"save_steps" if match[2].startswith("step") else "save_minutes": float(match[1])}


def offer_to_go_on(folder: Path) -> bool:
    """Ask whether to go on with a run that was stopped; only a person can be asked."""
    from lisatune.common.run_folder import describe_run

    if num_started() > 1 or not sys.stdin.isatty():
        return False
    if not (folder / "config.yaml").is_file() or (folder / "summary.json").is_file():
        return False
    return typer.confirm(f"{folder} holds {describe_run(folder).partition(':')[0]}. Resume it?", default=True, err=True)


def print_summary(summary: dict[str, Any], output: str) -> None:
    """The end of a run, for people."""
    from lisatune.common.amounts import gib, peak_of
    from lisatune.common.loss_names import ending_lines, loss_lines

    table = Table(show_header=False)
    for label, text in [*loss_lines(summary), *ending_lines(summary)]:
        table.add_row(label, text)
    if summary.get("skipped_steps"):
        table.add_row("steps left out", f"{summary['skipped_steps']:,}, whose loss or gradient was bad")
    table.add_row("tokens", f"{summary['tokens']:,} in {summary['steps']:,} steps, {summary['train_seconds']:.0f} s")
    table.add_row("peak memory", peak_of(summary))
    table.add_row("optimizer state", gib(summary["state_bytes"]))
    console.print(table)
    if summary.get("task") == "reward":
        tell(console, f"load it: AutoModelForSequenceClassification.from_pretrained('{output}/model')")
    else:
        tell(console, f"chat with it: lisatune chat {output}")
