"""Scores of decoder layers, and the file of weights that ``sampler=weighted`` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lisatune.common.bars import counting_bar
from lisatune.common.console import tell
from lisatune.common.files import write_whole
from lisatune.data.formats import parse_row, read_rows
from lisatune.data.tokenize import Encoder
from lisatune.errors import UserError
from lisatune.layers import find_layers
from lisatune.models.load import load_model, pick_device
from lisatune.samplers.scores import input_norms, outlier_scores, weight_norm_ratio
from lisatune.study.study import read_norms


def outliers_of(
    model: str,
    *,
    data: str | None = None,
    num_rows: int = 32,
    max_length: int = 1024,
    multiple: float = 5.0,
    decoder_name: str | None = None,
    device: str = "auto",
    console: Console,
) -> dict[str, float]:
    """Decoder layer to the share of its weights that are outliers, as ``outlier_scores`` counts them.

    Args:
        model: Folder, .gguf file, or hub name.
        data: Rows whose tokens are sent through the model, so that each weight counts times its input. Default: the
            weights alone.
        num_rows: How many rows of ``data``, the first ones.
        max_length: Tokens of a row that count at most.
        multiple: A weight is an outlier beyond this many times the mean of its layer.
        decoder_name: Dotted path of the decoder layers, if they are not recognised.
        device: Where the model computes.
        console: Where to show how far it is.
    Raises: UserError if the model or the data cannot be read, or nothing can be measured.
    """
    examples = list(map(parse_row, islice(read_rows(data), num_rows))) if data is not None else []
    if data is not None and not examples:
        raise UserError(f"{data}: holds no rows, so no input can be measured")
    place = pick_device(device)
    loaded, tokenizer = load_model(model, torch.bfloat16 if place.type == "cuda" else torch.float32)
    layers = find_layers(loaded.to(place), decoder_name)
    tell(console, layers.describe())
    if data is None:
        scores = outlier_scores(layers, None, multiple)
    else:
        documents = list(Encoder(tokenizer, max_length)(examples))
        tokens = sum(map(len, documents))
        tell(console, f"{len(documents):,} rows of {data}, {tokens:,} tokens")
        with counting_bar("rows", len(documents), console) as counter:

            def batches() -> Iterator[dict[str, Tensor]]:
                for document in documents:  # one by one, so that no padding is measured
                    yield {"input_ids": torch.tensor([document.ids], device=place)}
                    counter.advance()

            norms = input_norms(layers, batches())
        scores = outlier_scores(layers, norms, multiple)
    return {f"layers.{layer}": score for layer, score in scores.items()}


def ratios_of(lora_run: Path, full_run: Path) -> dict[str, float]:
    """Decoder layer to the paper's p(l), from the mean norms that two runs with ``norm_steps=1`` have recorded.

    Raises: UserError if a run holds no norms, is of another method, or has other layers.
    """
    norms = []
    for folder, method in ((lora_run, "lora"), (full_run, "full")):
        run = read_norms(folder)
        if run.method != method:
            raise UserError(
                f"{folder} is a run with method={run.method}: give a run of LoRA first, and one of full second"
            )
        decoder = [part for part in run.parts if part.startswith("layers.")]
        norms.append({part: float(run.parts[part][-1]["mean_norm"]) for part in decoder})
    return weight_norm_ratio(*norms)


def write_scores(scores: dict[str, float], path: Path) -> None:
    """Write the file that ``sampler_options={weights: FILE}`` reads; what is there is replaced.

    Raises: UserError if all scores are 0, which no layer can be sampled by, or the file cannot be written.
    """
    if not any(scores.values()):
        raise UserError("every layer has the score 0, so no layer would be sampled: lower --multiple, or give --data")
    try:
        write_whole(path, json.dumps(scores, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"the scores cannot be written to {path} ({error.strerror or error}): choose another"
        ) from error


def as_dict(scores: dict[str, float], path: Path) -> dict[str, Any]:
    """For ``--json``."""
    return {"scores": scores, "file": str(path)}


def show(scores: dict[str, float]) -> Table:
    """Layers, their scores, and their shares of the sum."""
    table = Table("layer", "score", "share of all", "")
    total, largest = sum(scores.values()), max(scores.values())
    for layer, score in scores.items():
        table.add_row(layer, f"{score:.4g}", f"{100 * score / total:.1f}%", "#" * round(20 * score / largest))
    return table
