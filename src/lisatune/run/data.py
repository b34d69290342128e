"""Rows as batches: encoded, counted, and recognised when a run is resumed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from lisatune.data import fingerprint
from lisatune.data.examples import HeldOut
from lisatune.data.files import find_source
from lisatune.data.formats import Example
from lisatune.data.loader import Batch, Loader, Stream
from lisatune.data.stream import EncodedStream
from lisatune.data.tokenize import Counts, Encoded, Encoder
from lisatune.errors import UserError
from lisatune.processes.collectives import num_ranks
from lisatune.settings import TrainConfig


@dataclass
class Data:
    """What a run learns from.

    Args:
        loader: Batches to train on.
        held_out: Name to batches to evaluate on, as ``preflight`` gives the rows.
        num_steps: Optimizer steps of the whole run.
        longest: Tokens of the longest row.
        identity: ``train`` and ``held-out`` to what they are recognised by.
        streamed: Counts of the rows of a stream, which grow as it is read; None if all were read at the start.
    """

    loader: Loader
    held_out: dict[str, list[Batch]]
    num_steps: int
    longest: int
    identity: dict[str, str]
    streamed: Counts | None


def prepare_data(
    config: TrainConfig, tokenizer: Any, examples: Iterable[Example], held_out: HeldOut, console: Console
) -> Data:
    def encoder() -> Encoder:
        return Encoder(tokenizer, config.max_length, completion_only_loss=config.completion_only_loss)

    def encode(some: Iterable[Example], name: str) -> list[Encoded]:
        encode_all = encoder()
        had_template = tokenizer.chat_template is not None
        with console.status(f"tokenizing {name}"):
            documents = list(encode_all(some))
        if tokenizer.chat_template is not None and not had_template:
            console.print("the tokenizer has no chat template: a plain one is used, and saved with the model")
        console.print(f"{name}: {encode_all.counts.describe()}", highlight=False)
        if not documents:
            raise UserError(
                f"{config.data}: no row holds anything to learn within max_length={config.max_length}: raise it"
            )
        return documents

    def load(documents: Sequence[Encoded] | Stream, rows_per_step: int, **options: Any) -> Loader:
        return Loader(
            documents, rows_per_step=rows_per_step, max_length=config.max_length, pad_id=tokenizer.pad_token_id or 0,
            packing=config.packing, seed=config.seed, **options,
        )  # fmt: skip

    documents: list[Encoded] | EncodedStream
    longest = config.max_length
    if config.streaming:
        documents = EncodedStream(encoder(), examples)
        source = find_source(config.data, split=config.dataset_split, config=config.dataset_config)
        identity = {"train": fingerprint.of_stream(source)}
        console.print(f"{config.data}: rows are read as they are needed")
    else:
        documents = encode(examples, "train")
        identity = {"train": fingerprint.of_documents(documents)}
        if not config.packing:
            longest = max(len(document) for document in documents)
    rows_per_pass = config.per_device_train_batch_size * num_ranks()
    loader = load(documents, rows_per_pass * config.gradient_accumulation_steps)
    num_steps = config.max_steps or max(1, math.ceil(config.num_train_epochs * loader.num_steps()))
    batches = {}
    for name, some in held_out.items():
        label = f"held out, {name}" if name else "held out"
        rows = encode(some, label)
        batches[name] = list(load(rows, rows_per_pass, shuffle=False).epoch(0))
        identity[label.replace(" ", "-", 1)] = fingerprint.of_documents(rows)
    return Data(
        loader,
        batches,
        num_steps,
        longest,
        identity,
        documents.encoder.counts if isinstance(documents, EncodedStream) else None,
    )
