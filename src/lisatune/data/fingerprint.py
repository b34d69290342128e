"""What a data set is recognised by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from lisatune.data.files import Source, find_source
from lisatune.data.tokenize import Encoded

ENDS_BYTES = 2**20


def of_documents(documents: Sequence[Encoded]) -> str:
    """Number, size and SHA-256 of the documents, token by token, labels included.

    So whatever changes what is learned changes it: rows, the tokenizer, the chat template, a limit of length.

    Example:
        >>> from array import array
        >>> of_documents([Encoded(array("i", [1, 2]), array("i", [-100, 2]))])[:33]
        '1 documents of 2 tokens (2806d3df'
    """
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document).to_bytes(8, "little"))
        digest.update(document.ids.tobytes())
        digest.update(document.labels.tobytes())
        if document.weights is not None:
            digest.update(document.weights.tobytes())
    tokens = sum(len(document) for document in documents)
    return f"{len(documents):,} documents of {tokens:,} tokens ({digest.hexdigest()[:16]})"


def of_stream(data: str | Source) -> str:
    """Number and bytes of the files of ``data``, with a SHA-256 of their names, sizes, and first and last MiB.

    A stream is too long to be read as a whole for this; a change in the middle of a file that keeps its size is not
    seen. A hub name stands for itself.
    """
    source = find_source(data) if isinstance(data, str) else data
    if source.kind == "hub":
        return source.data
    folder = Path(source.data).expanduser()
    files = [file.path for file in source.read] if source.kind == "files" else _below(folder)
    digest, total = hashlib.sha256(), 0
    for file in files:
        size = file.stat().st_size
        total += size
        digest.update(f"{file.relative_to(folder)} {size}\n".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(ENDS_BYTES))
            opened.seek(max(0, size - ENDS_BYTES))
            digest.update(opened.read(ENDS_BYTES))
    return f"{len(files):,} files of {total:,} bytes ({digest.hexdigest()[:16]})"


def _below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
