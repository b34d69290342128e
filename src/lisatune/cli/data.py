"""`lisatune data`."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lisatune.cli.common import OUTPUT, AsJson, ConfigFile, ModelName, console, quiet_libraries
from lisatune.cli.train import data_of

if TYPE_CHECKING:
    from lisatune.data.examples import HeldOut, Rows
    from lisatune.data.inspection import Inspection
    from lisatune.settings import TrainConfig

ROWS_SHOWN, ROWS_IN_JSON, ROWS_IN_PAGE = 5, 100, 200


def data(
    data: Annotated[str, typer.Argument(metavar="DATA", help="File, folder or hub name, or a list with shares.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the run, as for train.")
    ] = None,
    model: ModelName = None,
    config: ConfigFile = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="How many rows to show. Default: 5.", rich_help_panel=OUTPUT),
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Show the token ids of each row.", rich_help_panel=OUTPUT)] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page to scroll through.", rich_help_panel=OUTPUT)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a run would learn from your data, before you start it.

    You see the files that are read, the rows that are not used and why, and a few rows with the learned text marked.

    Example:
        lisatune data rows.jsonl --model HuggingFaceTB/SmolLM2-135M
        lisatune data rows.jsonl --model HuggingFaceTB/SmolLM2-135M \\
            --html rows.html
    """
    from lisatune.settings import build_config, read_settings

    settings: dict[str, Any] = {"output": "none"} | read_settings(config, overrides or []) | {"data": data_of(data)}
    checked = build_config(settings | ({} if model is None else {"model": model}))
    from lisatune.data.examples import read_examples
    from lisatune.models.names import check_model_name

    check_model_name(checked.model)
    train, held_out = read_examples(checked.model_copy(update={"streaming": False}))
    quiet_libraries()
    wanted = rows or (ROWS_IN_JSON if as_json else ROWS_IN_PAGE if html else ROWS_SHOWN)
    with console.status("tokenizing"):
        found = inspected(checked, train, held_out, wanted)
    from lisatune.data.view import show, write_page

    if html is not None:
        console.print(str(write_page(found, html, ids=ids)), markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(found.as_dict(ids=ids), ensure_ascii=False))
    elif html is None:
        terminal = Console()
        terminal.print(show(found, ids=ids, marks=terminal.color_system is None))


def inspected(config: TrainConfig, train: list[Rows], held_out: HeldOut, num_rows: int) -> Inspection:
    """What a run with ``config`` would see of its rows."""
    from lisatune.data.inspection import inspect
    from lisatune.models.load import load_tokenizer
    from lisatune.run.build import settle_template
    from lisatune.run.data import Encoding

    tokenizer, num_embeddings = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    if config.task != "sft":
        from lisatune.preferences.inspection import inspect_task

        return inspect_task(config, tokenizer, train[0], held_out, num_rows)
    config = settle_template(config, tokenizer)
    encoding = Encoding(config, tokenizer, num_embeddings, Console(quiet=True))
    encoded = []
    for some in train:
        lengths = array("l")
        documents, counts = encoding.documents(some, "train", lengths=lengths, may_be_empty=True)
        encoded.append((documents, counts, lengths or [len(document) for document in documents]))
    held = {name: encoding.documents(some, "eval", may_be_empty=True)[1] for name, some in held_out.items()}
    return inspect(
        train, encoded, tokenizer, max_length=config.max_length, batch_size=config.per_device_train_batch_size,
        num_rows=num_rows, seed=config.seed, held_out={name: (held_out[name], counts) for name, counts in held.items()},
    )  # fmt: skip
