"""`lisatune score-layers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lisatune.cli.common import OUTPUT, AnyDevice, AsJson, console, quiet_libraries
from lisatune.common.console import tell
from lisatune.errors import UserError

SCORES = "Scores"


def score_layers(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL | LORA_RUN FULL_RUN", help="A model, or two runs with norm_steps=1 for their ratio."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(help="File of the scores, for sampler_options={weights: FILE}.", rich_help_panel=OUTPUT),
    ] = Path("weights.json"),
    as_json: AsJson = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="Rows to send through the model. A weight then counts times its input.", rich_help_panel=SCORES
        ),
    ] = None,
    rows: Annotated[
        int, typer.Option(min=1, metavar="N", help="Use the first N rows of the data.", rich_help_panel=SCORES)
    ] = 32,
    max_length: Annotated[
        int, typer.Option(min=2, metavar="N", help="Longest row, in tokens.", rich_help_panel=SCORES)
    ] = 1024,
    multiple: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="X",
            help="A weight above X times the mean of its layer is an outlier.",
            rich_help_panel=SCORES,
        ),
    ] = 5.0,
    decoder_name: Annotated[
        str | None,
        typer.Option(help="Dotted path of the decoder layers, if they are not recognised.", rich_help_panel=SCORES),
    ] = None,
    device: AnyDevice = "auto",
) -> None:
    """Score decoder layers, and write the file that sampler=weighted samples by.

    A layer's score is the share of outliers among its weights (OWS, arXiv:2405.18380).

    For a LoRA run and a full run, it is the ratio of their mean weight norms (LISA, arXiv:2403.17919).

    Example:
        lisatune score-layers HuggingFaceTB/SmolLM2-135M --output weights.json
        lisatune train --model HuggingFaceTB/SmolLM2-135M --data rows.jsonl \\
            --output runs/a sampler=weighted \\
            sampler_options='{weights: weights.json}'
    """
    quiet_libraries()
    if len(models) > 2:
        raise UserError(
            f"{len(models)} models were given: give one model, or a run with method=lora and a run with method=full"
        )
    if len(models) == 2 and data is not None:
        raise UserError("--data has no effect on two runs, because their norms are recorded already: leave it out")
    from lisatune.study.layer_scores import as_dict, outliers_of, ratios_of, show, write_scores

    if len(models) == 2:
        scores = ratios_of(Path(models[0]), Path(models[1]))
    else:
        scores = outliers_of(
            models[0], data=data, num_rows=rows, max_length=max_length, multiple=multiple, decoder_name=decoder_name,
            device=device, console=console,
        )  # fmt: skip
    write_scores(scores, output)
    if as_json:
        print(json.dumps(as_dict(scores, output)))
        return
    Console().print(show(scores))
    tell(Console(), f"written to {output}: sampler=weighted sampler_options='{{weights: {output}}}'")
