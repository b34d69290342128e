"""`lisatune eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lisatune.cli.common import AnyDevice, AsJson, TrustRemoteCode, console, quiet_libraries


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="RUN|MODEL...", help="Folders of runs, models, hub names.")],
    tasks: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness, for example gsm8k,mmlu.")],
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with gsm8k/, mmlu/, ...: their data is read from there, not from the hub."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Documents of each task at most.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Examples before each question; the task's own by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts at a time.")] = 8,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Write prompts as chats, for a model that was taught chats.")
    ] = False,
    device: AnyDevice = "auto",
    output: Annotated[
        Path | None, typer.Option(help="Folder of scores.json; a run's own folder by default, for a model none.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Score models on tasks; a run's model before and after training."""
    quiet_libraries()
    from lisatune.evaluation.tasks.harness import find_tasks, task_names

    names = task_names(tasks)
    find_tasks(names, data_dir)
    from lisatune.evaluation.tasks.before_after import find_target, score_targets

    targets = [find_target(model, output) for model in dict.fromkeys(models)]
    found = score_targets(
        targets, names, data_dir=data_dir, limit=limit, num_fewshot=num_fewshot, batch_size=batch_size,
        chat_template=apply_chat_template, device=device, trust_remote_code=trust_remote_code,
        console=console,
    )  # fmt: skip
    if as_json:
        print(json.dumps([scored.as_dict() for scored in found]))
        return
    from lisatune.evaluation.tasks.table import show

    Console().print(show(found))
