"""`lisatune score-layers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lisatune.cli.common import AnyDevice, AsJson, console, quiet_libraries
from lisatune.common.console import tell
from lisatune.errors import UserError


def score_layers(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL | LORA_RUN FULL_RUN", help="A model; or two runs with norm_steps=1, for their ratio."
        ),
    ],
    output: Annotated[Path, typer.Option(help="File of the scores, for sampler_options={weights: FILE}.")] = Path(
        "weights.json"
    ),
    data: Annotated[
        str | None, typer.Option(help="Rows to send through the model: a weight then counts times its input.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, metavar="N", help="Rows of the data, the first ones.")] = 32,
    max_length: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens of a row at most.")] = 1024,
    multiple: Annotated[
        float, typer.Option(min=0, metavar="X", help="A weight beyond X times the mean of its layer is an outlier.")
    ] = 5.0,
    decoder_name: Annotated[
        str | None, typer.Option(help="Dotted path of the decoder layers, if they are not recognised.")
    ] = None,
    device: AnyDevice = "auto",
    as_json: AsJson = False,
) -> None:
    """Score decoder layers, and write the file by which sampler=weighted samples them.

    The score of a MODEL's layer is its share of outliers among weights (OWS, arXiv:2405.18380). With a run of LoRA and
    one of full fine-tuning it is the ratio of their mean weight norms (LISA, arXiv:2403.17919).
    """
    quiet_libraries()
    if len(models) > 2:
        raise UserError(f"{len(models)} models were given: give one model, or a run of LoRA and one of full")
    if len(models) == 2 and data is not None:
        raise UserError("--data has no effect on two runs, whose norms are recorded: leave it out")
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
