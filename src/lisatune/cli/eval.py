"""`lisatune eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lisatune.cli.common import MACHINE, OUTPUT, AnyDevice, AsJson, TrustRemoteCode, console, quiet_libraries
from lisatune.errors import UserError

TASKS = "Tasks"


def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="RUN|MODEL...", help="Folders of runs or models, or hub names.")
    ],
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness, for example gsm8k,mmlu.", rich_help_panel=TASKS),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the tasks' data (gsm8k/, mmlu/, ...), used instead of the hub.", rich_help_panel=TASKS
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Use at most N questions of each task.", rich_help_panel=TASKS),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help="Examples before each question. Default: the task's own.", rich_help_panel=TASKS
        ),
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option(
            "--apply-chat-template",
            help="Write prompts as chats, for a model that was trained on chats.",
            rich_help_panel=TASKS,
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of scores.json. Default: the run's folder; a model's scores are only printed.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    as_json: AsJson = False,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Prompts at a time.", rich_help_panel=MACHINE)
    ] = 8,
    device: AnyDevice = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Score models on tasks, and a run's model before and after training.

    It needs the extra 'eval': pip install '.\\[eval]' in a clone.

    Example:
        lisatune eval runs/a --tasks gsm8k --limit 100
    """
    if not tasks:
        raise UserError("tasks are missing: give --tasks, for example --tasks gsm8k,mmlu")
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
