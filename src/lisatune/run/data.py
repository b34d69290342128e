"""Rows as batches: encoded, counted, and recognised when a run is resumed."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from rich.console import Console

from lisatune.common.files import write_whole
from lisatune.data import fingerprint
from lisatune.data.examples import HeldOut, Rows, number_held_out, spread
from lisatune.data.loader import Batch, Loader, Stream
from lisatune.data.mixture import Mixture, interleaved
from lisatune.data.packing import pack_in_order
from lisatune.data.store import Store, encode_rows, stores_folder
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
        counts: What became of the rows of each data set to train on; those of a stream grow as it is read.
        names: The data sets to train on.
        streamed: Whether rows are read as they are needed.
    """

    loader: Loader
    held_out: dict[str, list[Batch]]
    num_steps: int
    longest: int
    identity: dict[str, str]
    counts: list[Counts]
    names: list[str]
    streamed: bool

    def ends(self) -> list[int]:
        """The tokens that end what is learned, the most frequent first."""
        ends = sum((counts.ends for counts in self.counts), start=Counts().ends)
        return [token for token, _ in ends.most_common()]


class Encoding:
    """Encodes the data sets of a run, each once, and tells what became of their rows.

    Args:
        config: The settings.
        tokenizer: The model's tokenizer; it is given a chat template with the first chat, if it has none.
        num_embeddings: Rows of the model's embedding.
        console: Where it is told.
    """

    def __init__(self, config: TrainConfig, tokenizer: Any, num_embeddings: int | None, console: Console) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.console = console
        self.num_embeddings = num_embeddings if num_embeddings is not None and len(tokenizer) > num_embeddings else None
        self.identity: dict[str, str] = {}

    def encoder(self) -> Encoder:
        """A new encoder, whose counts are 0."""
        config = self.config
        return Encoder(
            self.tokenizer, config.max_length, completion_only_loss=config.completion_only_loss, loss_on=config.loss_on,
            too_long=config.excess_length_strategy, num_embeddings=self.num_embeddings, on_bad_row=config.on_bad_row,
            today=date.fromisoformat(config.template_date) if config.template_date else None,
        )  # fmt: skip

    def documents(
        self, rows: Rows, name: str, *, lengths: array[int] | None = None, may_be_empty: bool = False
    ) -> tuple[Sequence[Encoded], Counts]:
        """All documents of ``rows``: in memory, or in a store where they are many or one is asked for.

        ``lengths`` is given the tokens of each row as they were before anything was cut, if rows are encoded in memory.

        Raises: UserError for a bad row; and if there is no document, unless it ``may_be_empty``.
        """
        encoder, had_template = self.encoder(), self.tokenizer.chat_template is not None
        path = self.config.dataset_prepared_path
        documents: Sequence[Encoded]
        with self.console.status(f"tokenizing {name}") as status:
            if rows.examples is None:
                documents = encode_rows(
                    rows, encoder, stores_folder(path), num_proc=self.config.dataset_num_proc,
                    tell=lambda done: status.update(f"tokenizing {name}: {done:,} rows"),
                )  # fmt: skip
            else:
                for error in rows.bad:
                    encoder.counts.skip(error)
                encoder.lengths = lengths
                documents = list(encoder(rows))
        if self.tokenizer.chat_template is not None and not had_template:
            self.console.print("the tokenizer has no chat template: a plain one is used, and saved with the model")
        self.told(name, rows, encoder.counts)
        if not documents and not may_be_empty:
            why = f" ({encoder.counts.describe()})" if encoder.counts.refused else ""
            raise UserError(
                f"{rows.name}: no row holds anything to learn within max_length={self.config.max_length}: raise it{why}"
            )
        return documents, encoder.counts

    def told(self, name: str, rows: Rows, counts: Counts) -> None:
        """Tell which files were read, and what became of their rows."""
        self.console.print(f"{name}: {rows.source.describe()}", markup=False, highlight=False, soft_wrap=True)
        self.console.print(f"{name}: {counts.describe()}", markup=False, highlight=False, soft_wrap=True)

    def recognise(self, label: str, documents: Sequence[Encoded], view: str = "") -> None:
        """Keep what ``documents`` are recognised by; that of a store is computed once."""
        if not isinstance(documents, Store):
            self.identity[label] = fingerprint.of_documents(documents)
            return
        path = documents.folder / f"identity{view}.txt"
        if not path.is_file():
            write_whole(path, fingerprint.of_documents(documents))
        self.identity[label] = path.read_text(encoding="utf-8")


def prepare_data(
    config: TrainConfig,
    tokenizer: Any,
    train: Sequence[Rows],
    held_out: HeldOut,
    console: Console,
    num_embeddings: int | None = None,
) -> Data:
    """The batches of a run.

    Raises: UserError for a bad row, or if there is nothing to learn.
    """
    encoding = Encoding(config, tokenizer, num_embeddings, console)
    names = [rows.name for rows in train]

    # the rows to train on, and those of them that are held out
    held: dict[str, Sequence[Encoded]] = {}
    documents: Sequence[Encoded] | Mixture | Stream
    if config.streaming:
        documents, counts, longest = _stream(encoding, train), [], config.max_length
        counts = [documents.encoder.counts]
        encoding.identity["train"] = _of_all([fingerprint.of_stream(rows.source) for rows in train])
    else:
        parts, counts = _encode(encoding, train, held)
        longest = config.max_length if config.packing else max(_longest(some) for some in parts)
        documents = (
            parts[0] if len(parts) == 1 else Mixture(parts, [rows.share for rows in train], config.seed, config.shuffle)
        )
        if isinstance(documents, Mixture):
            _tell_mixture(documents, names, console)

    # batches: of a step to train on, of a pass to evaluate on
    rows_per_pass = config.per_device_train_batch_size * num_ranks()
    pad_id = _pad_id(tokenizer, num_embeddings)

    def load(some: Sequence[Encoded] | Mixture | Stream, rows_per_step: int, **options: Any) -> Loader:
        return Loader(
            some, rows_per_step=rows_per_step, max_length=config.max_length, pad_id=pad_id, packing=config.packing,
            seed=config.seed, **options,
        )  # fmt: skip

    order: dict[str, Any] = (
        {"group_by_length": config.group_by_length} if config.shuffle else {"shuffle": False, "pack": pack_in_order}
    )
    loader = load(documents, rows_per_pass * config.gradient_accumulation_steps, **order)
    num_steps = config.max_steps or max(1, math.ceil(config.num_train_epochs * loader.num_steps()))

    # the sets that are held out by name
    for name, some_rows in held_out.items():
        label = f"held out, {name}" if name else "held out"
        held[name], _ = encoding.documents(some_rows, label)
        encoding.recognise(label.replace(" ", "-", 1), held[name])
    batches = {name: list(load(some, rows_per_pass, shuffle=False).epoch(0)) for name, some in held.items()}
    return Data(loader, batches, num_steps, longest, encoding.identity, counts, names, config.streaming)


def _encode(
    encoding: Encoding, train: Sequence[Rows], held: dict[str, Sequence[Encoded]]
) -> tuple[list[Sequence[Encoded]], list[Counts]]:
    """Documents of each source, and what was counted in it; a share that is held out goes into ``held``."""
    parts: list[Sequence[Encoded]] = []
    counts: list[Counts] = []
    for rows in train:
        some, counted = encoding.documents(rows, "train" if len(train) == 1 else f"train, {rows.name}")
        if rows.hold_out:
            assert isinstance(some, Store)
            number = some.about["num_examples"]
            held[""], some = some.split(spread(number, number_held_out(number, rows.hold_out, rows.name)))
            encoding.recognise("held-out", held[""], f"-{rows.hold_out}-held-out")
        parts.append(some)
        counts.append(counted)
        encoding.recognise(f"train {rows.name}", some, f"-{rows.hold_out}" * bool(rows.hold_out))
    digests = [encoding.identity.pop(f"train {rows.name}") for rows in train]
    encoding.identity = {"train": _of_all(digests)} | encoding.identity
    return parts, counts


def _stream(encoding: Encoding, train: Sequence[Rows]) -> EncodedStream:
    encoder = encoding.encoder()
    for rows in train:
        encoding.console.print(
            f"train: {rows.source.describe()}; rows are read as they are needed",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
        if encoder.on_bad_row == "skip":
            rows.bad = _Counted(encoder)
    return EncodedStream(encoder, train[0] if len(train) == 1 else _Interleaved(train))


class _Counted(list[UserError]):
    """A list of bad rows that counts each where it is met."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def append(self, error: UserError) -> None:
        """Count it."""
        self.encoder.counts.skip(error)


@dataclass
class _Interleaved:
    """The examples of several data sets in their shares, read anew each time."""

    train: Sequence[Rows]

    def __iter__(self) -> Any:
        return (example for _, example in interleaved(self.train, [rows.share for rows in self.train]))


def _of_all(identities: Sequence[str]) -> str:
    return "; ".join(identities)


def _longest(documents: Sequence[Encoded]) -> int:
    return int(documents.lengths().max()) if isinstance(documents, Store) else max(map(len, documents))


def _pad_id(tokenizer: Any, num_embeddings: int | None) -> int:
    """A token to fill rows up with; what stands there is never seen, but it needs an embedding."""
    pad = tokenizer.pad_token_id or 0
    return pad if num_embeddings is None or pad < num_embeddings else 0


def _tell_mixture(mixture: Mixture, names: Sequence[str], console: Console) -> None:
    counts, total = mixture.counts(), sum(mixture.counts())
    for name, count, part in zip(names, counts, mixture.parts, strict=True):
        console.print(
            f"train, {name}: {count:,} of its {len(part):,} rows in an epoch, {count / total:.1%} of all",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
