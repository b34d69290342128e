"""`lisatune data`."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lisatune.cli.common import OUTPUT, AsJson, ConfigFile, ModelName, console, quiet_libraries
from lisatune.cli.train import data_of

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
    from lisatune.errors import UserError
    from lisatune.models.names import check_model_name

    if checked.task != "sft":
        raise UserError(
            f"lisatune data works with task=sft only; with task={checked.task}, lisatune train prints at its start which rows it uses"
        )
    check_model_name(checked.model)
    train, held_out = read_examples(checked.model_copy(update={"streaming": False}))
    quiet_libraries()
    from lisatune.data.inspection import inspect
    from lisatune.data.view import show, write_page
    from lisatune.models.load import load_tokenizer
    from lisatune.run.build import settle_template
    from lisatune.run.data import Encoding

    tokenizer, num_embeddings = load_tokenizer(checked.model, trust_remote_code=checked.trust_remote_code)
    checked = settle_template(checked, tokenizer)
    encoding = Encoding(checked, tokenizer, num_embeddings, Console(quiet=True))
    encoded = []
    with console.status("tokenizing"):
        for some in train:
            lengths = array("l")
            documents, counts = encoding.documents(some, "train", lengths=lengths, may_be_empty=True)
            encoded.append((documents, counts, lengths or [len(document) for document in documents]))
        held = {name: encoding.documents(some, "eval", may_be_empty=True)[1] for name, some in held_out.items()}
    wanted = rows or (ROWS_IN_JSON if as_json else ROWS_IN_PAGE if html else ROWS_SHOWN)
    found = inspect(
        train, encoded, tokenizer, max_length=checked.max_length, batch_size=checked.per_device_train_batch_size,
        num_rows=wanted, seed=checked.seed, held_out={name: (held_out[name], counts) for name, counts in held.items()},
    )  # fmt: skip
    if html is not None:
        console.print(str(write_page(found, html, ids=ids)), markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(found.as_dict(ids=ids), ensure_ascii=False))
    elif html is None:
        terminal = Console()
        terminal.print(show(found, ids=ids, marks=terminal.color_system is None))
