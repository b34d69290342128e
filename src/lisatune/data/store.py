"""Encoded rows on the disk, memory-mapped: encoded once, by all cores, and never held whole.

A token takes 2 bytes, or 4 where the vocabulary has more than 65,536; what is learned is kept as spans.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np

from lisatune.data.examples import Rows
from lisatune.data.formats import RowParser, parse_rows
from lisatune.data.read import Row, rows_of
from lisatune.data.render import writes_date
from lisatune.data.tokenize import BATCH_EXAMPLES, IGNORED, Counts, Encoded, Encoder

FORMAT = 3  # raised with each change of what an encoder makes of a row
FILES = {
    "ids": None,  # uint16 or uint32: all ids, one document after the other
    "lengths": np.uint32,  # one for each document
    "num_spans": np.uint32,  # one for each document
    "spans": np.uint32,  # begin and end of each span that is learned
    "span_weights": np.float32,  # what the loss of each span counts
    "places": np.uint32,  # for each document: which place it is from, the number of the row there, and the number of the answer
    "examples": np.uint32,  # for each document: the number of its example
}


class Store(Sequence[Encoded]):
    """Documents of a folder that ``encode_rows`` wrote, read when they are asked for.

    Args:
        folder: Where they are.
        chosen: The documents that this view shows, in order; all if not given.
    """

    def __init__(self, folder: Path, chosen: np.ndarray[Any, Any] | None = None) -> None:
        self.folder = folder
        self.about: dict[str, Any] = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        types = FILES | {"ids": np.dtype(self.about["ids"])}
        self._files = {name: _mapped(folder / name, types[name]) for name in FILES}
        lengths, num_spans = self._files["lengths"], self._files["num_spans"]
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._span_starts = np.concatenate([[0], np.cumsum(num_spans, dtype=np.int64)])
        self.chosen = np.arange(len(lengths)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        """The document, as the encoder made it."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = int(self.chosen[index])
        ids = self._files["ids"][self._starts[number] : self._starts[number + 1]].astype(np.int32)
        labels = np.full(len(ids), IGNORED, dtype=np.int32)
        weights: array[float] | None = None
        first, last = self._span_starts[number], self._span_starts[number + 1]
        span_weights = self._files["span_weights"][first:last]
        scaled = not np.isin(span_weights, (0.0, 1.0)).all()
        if scaled:
            weights = array("f", bytes(4 * len(ids)))
        for (begin, end), weight in zip(self._files["spans"].reshape(-1, 2)[first:last], span_weights, strict=True):
            labels[begin:end] = ids[begin:end]
            if weights is not None:
                weights[int(begin) : int(end)] = array("f", [float(weight)] * int(end - begin))
        return Encoded(
            array("i", ids.tobytes()), array("i", labels.tobytes()), self._where(number), weights, self.source
        )

    @property
    def source(self) -> int:
        """The number of the data set that the documents are of."""
        return int(self.about["source"])

    @property
    def counts(self) -> Counts:
        """What became of the rows when they were encoded."""
        told = self.about["counts"]
        return Counts(**told | {"ends": Counter({int(k): v for k, v in told["ends"].items()})}
                      | {name: Counter(told[name]) for name in ("reasons", "left_out")})  # fmt: skip

    def lengths(self) -> np.ndarray[Any, Any]:
        """Tokens of each document."""
        return self._files["lengths"][self.chosen]

    def split(self, examples: set[int]) -> tuple[Store, Store]:
        """The documents of the examples with these numbers, and the others."""
        inside = np.isin(self._files["examples"], np.fromiter(examples, dtype=np.uint32, count=len(examples)))
        return tuple(Store(self.folder, np.flatnonzero(mask)) for mask in (inside, ~inside))  # type: ignore[return-value]

    def _where(self, number: int) -> str:
        place, row, answer = self._files["places"].reshape(-1, 3)[number]
        return f"{self.about['places'][place]} {row}" + (f", answer {answer}" if answer else "")


def _mapped(path: Path, kind: Any) -> np.ndarray[Any, Any]:
    if path.stat().st_size == 0:
        return np.empty(0, dtype=kind)
    return np.memmap(path, dtype=kind, mode="r")


# -- writing ---------------------------------------------------------------------------------------------------------


@dataclass
class _Packed:
    """The documents of some rows as bytes, for the way from one process to another."""

    ids: bytes
    lengths: list[int]
    spans: list[list[tuple[int, int, float]]]
    wheres: list[str]
    examples: list[int]
    num_examples: int
    counts: Counts


def encode_rows(
    rows: Rows, encoder: Encoder, folder: Path, *, num_proc: int | None = None, tell: Any = lambda done: None
) -> Store:
    """The documents of ``rows``; those of an earlier call with the same data, tokenizer and settings, if there are.

    Args:
        rows: The data set; it is read here, and not held.
        encoder: Encodes; its counts are those of all rows in the end.
        folder: Where stores are, each under the hash of all that it depends on.
        num_proc: Processes that encode; all cores if not given.
        tell: Called with the number of rows that are done.
    """
    own = folder / key_of(rows, encoder)
    if not (own / "about.json").is_file():
        new = own.with_name(f".{own.name}.{os.getpid()}")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            _write(rows, encoder, new, num_proc or os.cpu_count() or 1, tell)
            if not own.exists():
                new.replace(own)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    store = Store(own)
    encoder.counts = store.counts
    rows.source.num_rows = store.about["num_rows"]
    for file, (num_rows, note) in zip(rows.source.read, store.about["files"], strict=True):
        file.num_rows, file.note = num_rows, note
    if encoder.counts.chats:
        _ = encoder.renderer  # gives the tokenizer a chat template, if it has none
    return store


def _write(rows: Rows, encoder: Encoder, folder: Path, num_proc: int, tell: Any) -> None:
    kind = np.dtype(np.uint16 if len(encoder.tokenizer) <= 2**16 else np.uint32)
    digest, places, counts = hashlib.sha256(), dict[str, int](), Counts()
    num_documents = num_examples = 0
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in FILES}
        for packed in _encoded(rows, encoder, num_proc):
            ids = np.frombuffer(packed.ids, dtype=np.int32)
            files["ids"].write(ids.astype(kind).tobytes())
            files["lengths"].write(np.array(packed.lengths, dtype=np.uint32).tobytes())
            files["num_spans"].write(np.array([len(spans) for spans in packed.spans], dtype=np.uint32).tobytes())
            flat = [span for spans in packed.spans for span in spans]
            files["spans"].write(np.array([span[:2] for span in flat], dtype=np.uint32).tobytes())
            files["span_weights"].write(np.array([span[2] for span in flat], dtype=np.float32).tobytes())
            located = [_place(where, places) for where in packed.wheres]
            files["places"].write(np.array(located, dtype=np.uint32).tobytes())
            files["examples"].write(np.array([num_examples + i for i in packed.examples], dtype=np.uint32).tobytes())
            num_documents += len(packed.lengths)
            num_examples += packed.num_examples
            counts.add(packed.counts)
            digest.update(packed.ids)
            tell(counts.read)
    for error in rows.bad:
        counts.skip(error)
    told = asdict(counts) | {name: dict(getattr(counts, name)) for name in ("reasons", "left_out", "ends")}
    about = {
        "format": FORMAT, "ids": kind.name, "places": list(places), "counts": told, "num_examples": num_examples,
        "num_documents": num_documents, "source": rows.parser.source, "num_rows": rows.source.num_rows,
        "files": [(file.num_rows, file.note) for file in rows.source.read],
    }  # fmt: skip
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def _place(where: str, places: dict[str, int]) -> tuple[int, int, int]:
    """``a.jsonl, line 3, answer 2`` as a number for ``a.jsonl, line``, and 3, and 2."""
    before, comma, answer = where.rpartition(", answer ")
    text, _, number = (before if comma else where).rpartition(" ")
    return places.setdefault(text, len(places)), int(number), int(answer) if comma else 0


def _encoded(rows: Rows, encoder: Encoder, num_proc: int) -> Iterator[_Packed]:
    """Rows in groups, encoded, in their order."""
    rows.bad.clear()
    stream = rows_of(rows.source, streaming=rows.streaming, on_bad=rows.on_bad)
    groups = iter(lambda: list(islice(stream, BATCH_EXAMPLES)), [])
    if num_proc == 1:
        yield from (_pack(group, rows.parser, encoder) for group in groups)
        return
    context = multiprocessing.get_context("spawn")  # a fork would take over locks of libraries' threads
    with ProcessPoolExecutor(num_proc, context, _begin_work, (rows.parser, encoder)) as pool:
        waiting: list[Future[_Packed]] = []
        for group in groups:
            waiting.append(pool.submit(_work, group))
            if len(waiting) > 4 * num_proc:
                yield waiting.pop(0).result()
        yield from (future.result() for future in waiting)


_AT_WORK: list[Any] = []


def _begin_work(parser: RowParser, encoder: Encoder) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has a core
    _AT_WORK[:] = [parser, encoder]


def _work(group: list[Row]) -> _Packed:
    parser, encoder = _AT_WORK
    return _pack(group, parser, encoder)


def _pack(group: Sequence[Row], parser: RowParser, encoder: Encoder) -> _Packed:
    encoder.counts = Counts()
    examples = list(parse_rows(iter(group), parser, encoder.on_bad))
    documents = [(i, document) for i, some in enumerate(encoder.encode(examples)) for document in some]
    return _Packed(
        b"".join(document.ids.tobytes() for _, document in documents),
        [len(document) for _, document in documents],
        [list(_spans(document)) for _, document in documents],
        [document.where for _, document in documents],
        [i for i, _ in documents],
        len(examples),
        encoder.counts,
    )


def _spans(document: Encoded) -> Iterator[tuple[int, int, float]]:
    """Begin, end and weight of each run of labels."""
    weights = document.weights or array("f", [1.0]) * len(document)
    begin, before = 0, 0.0
    for position, (label, weight) in enumerate(zip(document.labels, weights, strict=True)):
        now = weight if label != IGNORED else 0.0
        if now != before:
            if before:
                yield begin, position, before
            begin, before = position, now
    if before:
        yield begin, len(document), before


def key_of(rows: Rows, encoder: Encoder) -> str:
    """A hash of all that the documents depend on: the files' bytes, how rows are read, the tokenizer, the settings."""
    tokenizer = encoder.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    told: dict[str, Any] = {
        "format": FORMAT,
        "versions": [version(package) for package in ("lisatune", "transformers", "tokenizers", "jinja2")],
        "name": rows.name,
        "files": [[str(path), file_digest(path)] for path in rows.source.paths],
        "source": [rows.source.kind, rows.source.split, rows.source.config, rows.on_bad_row],
        "parser": [dict(rows.parser.columns), dict(rows.parser.roles), rows.parser.source],
        "tokenizer": backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        "special": [tokenizer.bos_token, tokenizer.eos_token, str(tokenizer.chat_template)],
        "encoder": [encoder.max_length, encoder.loss_on, encoder.too_long, encoder.num_embeddings, encoder.on_bad_row],
        "today": str(encoder.today) if writes_date(tokenizer.chat_template) else None,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """BLAKE2b of a file's bytes; about a second a GiB."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "blake2b").hexdigest()


def stores_folder(given: str | None) -> Path:
    """Where stores are: ``given``, or ``lisatune`` in the user's cache folder."""
    if given is not None:
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "lisatune" / "encoded"
