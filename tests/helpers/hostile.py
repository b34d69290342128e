"""Hostile rows, settings and checkpoints, and what must hold for them.

Everything is drawn through a ``Pick``, which hypothesis drives in the tests and a coverage-guided fuzzer in
``benchmarks/fuzz.py``, so both know the same near-misses. An oracle returns what became of its input in a few words, raises
AssertionError for a broken promise, and lets any exception but ``UserError`` through: that is a traceback for a user.
"""

import gzip
import hashlib
import json
import shutil
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from lisatune import UserError
from lisatune.assemble import make_method
from lisatune.data.formats import Example, Row, parse_row, read_rows
from lisatune.run.checkpoint import MANIFEST, STATE, Damaged, read_manifest, read_state
from lisatune.settings import LAYERWISE, TrainConfig, build_config, read_settings, write_config

# what a refusal is counted as: the first of these that its message holds
REFUSALS = (
    "not valid JSON", "nested too deep", "too many digits", "appears twice", "not UTF-8", "whole gzip file",
    "a row must be a JSON object", "are not recognised; expected messages", "must be a string", "half of a character",
    "a chat must be a list of turns", "that is a string", "; expected one of", "has no assistant turn", "begins with an assistant turn",
    "chat template", "not valid YAML", "must hold 'name: value' lines", "cannot be read", "of the form key=value",
    "unknown setting", "has no effect", "cannot be printed", "is too large", "leaves nothing of", "must be smaller than", "user name or password",
    ": input should be", ": string should", "needs", "cannot", "is missing", "choose at least",
    "base model is not", "does not fit", "of no part of this model", "that was saved for this model", "not in that part", "active at step", "there is no sampler", "has no option", "cannot be made", "sampler_options", "decoder layers",
    "draw of layers", "is not the name of a checkpoint's file", "SHA-256 differs", "bytes instead of", "is a link", "is a symbolic link", "is of step",
    f"names no {STATE}", "is not a folder", "holds no JSON object", f"{MANIFEST}: ", f"{STATE}: ",
)  # fmt: skip


class Pick(ABC):
    """A source of choices."""

    @abstractmethod
    def integer(self, low: int, high: int) -> int:
        """One of ``low`` to ``high``, both included."""

    @abstractmethod
    def raw(self, most: int) -> bytes:
        """At most so many bytes."""

    def one_of(self, choices):
        return choices[self.integer(0, len(choices) - 1)]

    def chance(self, one_in: int) -> bool:
        return self.integer(1, one_in) == one_in  # not when a source has run dry, or is at its simplest


def refusal(error: UserError) -> str:
    """What ``error`` is counted as, if it is fit for a user: one line, printable, no longer than a screen."""
    message = str(error)
    assert message.isprintable(), ascii(message)
    assert 10 < len(message) < 2000, message
    return next((f"refused: {words.strip('; :')}" for words in REFUSALS if words in message), "refused: other")


# --- rows

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
GOOD_ROWS = [
    {"messages": CHAT},
    {"messages": [{"role": "system", "content": "Be kind"}, *CHAT, *CHAT]},
    {"prompt": "Hi", "completion": "Hello"},
    {"prompt": CHAT[:1], "completion": CHAT[1:]},
    {"question": "Hi", "answer": "Hello"},
    {"problem": "Hi", "solution": "Hello", "level": 3},
    {"instruction": "Hi", "input": None, "output": "Hello"},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"text": "once upon a time"},
]
COLUMNS = sorted({name for row in GOOD_ROWS for name in row} | {"role", "content", "from", "value"})
WORDS = [
    "", " ", "user", "assistant", "human", "gpt", "robot", "Hi", "\n", "\0", "\x1b[31m", "\ufeff", "\u2028", "\x85", "\u202e",
    "\ud800", "a\udfff", "\U0001f600", "ﬃ", "</s>", "<script>", "### Assistant:", "{{ 7 * 7 }}", "{% raise %}", "x" * 300,
]  # fmt: skip
NUMBERS = [0, 1, -1, 2**31, 2**63, 2**64, -(2**70), 10**4000, 0.1, 1e308, float("inf"), float("nan")]
# spliced into JSON text
SPLICES = [
    "9" * 5000, "-1e999999", "NaN", "\\ud800", "\\ud83d\\ude00", "\\u0000", "\0", "\ufeff", "\u2028", "\x85", "\r", "\n", "\r\n",
    "\n\n \t\n", "\x1c", "[", "]", "{", "}", '"', ",", ":", "\\", "[" * 3000, '{"a":' * 3000, '"text": "x", "text": "y", ',
    "null", "true", "[1]", "/* note */", "'", "<", "\x7f",
]  # fmt: skip


def value(pick: Pick, depth: int = 2):
    """Anything that JSON can say."""
    kind = pick.integer(0, 9 if depth else 5)
    if kind <= 1:
        return pick.one_of(WORDS)
    if kind == 2:
        return "".join(chr(byte * pick.one_of([1, 217])) for byte in pick.raw(6))  # 217 * 253 is a surrogate
    if kind == 3:
        return pick.one_of([None, True, False])
    if kind <= 5:
        return pick.one_of(NUMBERS)
    if kind <= 7:
        return [value(pick, depth - 1) for _ in range(pick.integer(0, 3))]
    return {pick.one_of(COLUMNS + WORDS): value(pick, depth - 1) for _ in range(pick.integer(0, 3))}


def row(pick: Pick):
    """A good row, or one that misses by an edit or two; seldom something else."""
    if pick.chance(20):
        return value(pick)
    columns = json.loads(json.dumps(pick.one_of(GOOD_ROWS)))
    for _ in range(max(0, pick.integer(-3, 2))):
        name = pick.one_of(COLUMNS + WORDS) if pick.chance(4) or not columns else pick.one_of(sorted(columns))
        turns = columns.get(name)
        if isinstance(turns, list) and turns and not pick.chance(3):
            turn = pick.one_of(turns)
            if isinstance(turn, dict):
                turn[pick.one_of(["role", "content", "from", "value"])] = value(pick)
        elif pick.chance(4):
            columns.pop(name, None)
        else:
            columns[name] = value(pick)
    return columns


def row_file(pick: Pick) -> tuple[str, bytes]:
    """Name and bytes of a file of rows, more or less."""
    name = pick.one_of(["rows.jsonl", "rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.json.gz"])
    if pick.chance(10):
        return name, pick.raw(200)
    rows = [json.dumps(row(pick), ensure_ascii=not pick.chance(3)) for _ in range(pick.integer(0, 5))]
    if ".jsonl" in name or pick.chance(3):
        text = pick.one_of(["\n", "\n", "\r\n", "\r", "\n\n", "\u2028"]).join(rows) + pick.one_of(["", "\n", " "])
    else:
        text = f"[{', '.join(rows)}]"
    if pick.chance(3):
        place = pick.integer(0, len(text))
        text = text[:place] + pick.one_of(SPLICES) + text[place + pick.integer(0, 2) :]
    encoding = pick.one_of(["utf-8"] * 12 + ["utf-8-sig", "utf-16"])
    data = text.encode(encoding, "surrogatepass")
    if name.endswith(".gz"):
        data = gzip.compress(data, 1, mtime=0) if pick.chance(2) else gzip.compress(data[:5]) + gzip.compress(data[5:])
    if pick.chance(8):
        data = _broken(pick, data)
    return name, data


def _broken(pick: Pick, data: bytes) -> bytes:
    """``data`` with a byte changed, cut off, or with something behind."""
    place = pick.integer(0, max(0, len(data) - 1))
    return pick.one_of(
        [data[:place], data + pick.raw(4), data[:place] + bytes([pick.integer(0, 255)]) + data[place + 1 :]]
    )


def try_rows(path: Path, make_encoder) -> str:
    """Read and encode a file: every row of it is used, or refused by name, or counted as refused."""
    examples: list[Example] = []
    try:
        examples.extend(map(parse_row, read_rows(str(path))))
    except UserError as error:
        _check_place(error, path, len(examples))
        return refusal(error)
    assert [example.where for example in examples] == places(path)
    encoder = make_encoder()
    try:
        documents = list(encoder(examples))
    except UserError as error:
        _check_start(error, *(example.where for example in examples))
        return refusal(error)
    counts = encoder.counts
    assert counts.read == counts.used + counts.refused == len(examples)
    assert len({document.where for document in documents}) == counts.used
    assert counts.tokens == sum(map(len, documents))
    assert all(text in counts.describe() for text in (f"{counts.read:,} rows read", f"{counts.used:,} used"))
    assert (f"{counts.refused:,} refused" in counts.describe()) == bool(counts.refused)
    return f"read, {'all' if not counts.refused else 'some' if counts.used else 'none'} used"


def _check_place(error: UserError, path: Path, num_good: int) -> None:
    """An error names the file, and one about a row is about the row after those that were good."""
    _check_start(error, str(path))
    where = str(error).removeprefix(str(path))
    if where.startswith((", line ", ", row ")) and "column" not in where:
        _check_start(error, places(path)[num_good])


def _check_start(error: UserError, *starts: str) -> None:
    assert str(error).startswith(starts), error


def places(path: Path) -> list[str]:
    """The rows of a file as a reader without our code would count them: lines that are not blank, or items of a list."""
    data = b"".join(_pieces(path)) if path.suffix == ".gz" else path.read_bytes()
    text = data.decode("utf-8-sig", "replace")
    if ".jsonl" not in path.name and text.lstrip().startswith("["):
        try:
            return [f"{path}, row {number + 1}" for number in range(len(json.loads(text)))]
        except (ValueError, RecursionError):
            return [f"{path}, row 1"]
    if ".jsonl" not in path.name and _is_one_object(text):
        return [f"{path}, row 1"]
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [f"{path}, line {number}" for number, line in enumerate(lines, start=1) if line.strip()]


def _is_one_object(text: str) -> bool:
    """Whether ``text`` is one JSON object; no drawn object has rows under a key."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _pieces(path: Path) -> Iterator[bytes]:
    """What can be read of a gzip file before it breaks off."""
    with gzip.open(path) as file:
        try:
            while piece := file.read1():
                yield piece
        except (OSError, EOFError, zlib.error):
            return


def try_row(columns) -> str:
    """Recognise one row that is in memory."""
    try:
        example = parse_row(Row("here", columns))
    except UserError as error:
        _check_start(error, "here")
        return refusal(error)
    assert (example.text is None) == bool(example.messages)
    for text in [example.text or "", *(message["content"] for message in example.messages)]:
        text.encode()  # raises for what no tokenizer takes
    return "read"


# --- settings

NEEDED = {"model": "m", "data": "d", "output": "o"}
NAMES = list(TrainConfig.model_fields)
FITTING = {name: [str(field.default).lower()] for name, field in TrainConfig.model_fields.items()} | {
    "method": ["lisa", "fixed", "badam", "lora", "full", "mezo"], "sampler_options": ["{}", "{layers: [0]}", "{weights: [1, 2]}"],
    "sampler": ["uniform", "bernoulli", "sweep", "round_robin", "fixed", "weighted", "gradient_norm"], "train_embedding": ["false", "sampled"], "gradient_checkpointing": ["true", "2"],
    "optim": ["adamw_8bit"], "max_steps": ["5", "100"], "eval_rows": ["3"], "eval_data": ["e"], "seed": ["7", "٣"],
}  # fmt: skip
NEAR_NAMES = [
    "learning_rat",
    "Seed",
    "seed ",
    "",
    "x" * 3000,
    "\x1b[31m",
    "model_config",
    "__class__",
    "<<",
    "1",
    "null",
]
SCALARS = [
    "1", "2", "0", "-1", "5", "20", "1e-3", "5e-4", "0.5", "true", "false", "null", "~", "yes", "off", "", "lisa", "lora", "full",
    "sampled", "adamw_8bit", "cosine", "cpu", "keep", "stop", "skip", "none", "auto", "text", "a/b", "[]", "{}", "[a, b]",
    "{a: 1}", "{seed: 1}", "{name: x}", "{layers: 0}", "{layers: [x]}", "{layers: [99]}", "{weights: 1}", "{weights: [x, y]}",
    "{weights: {layers.0: x}}", "{weights: nowhere.json}", "{probabilities: x}", "{temperature: x}", "{temperature: .nan}",
    "{temperature: [1]}", "{refresh_intervals: 1.5}", "{smoothing: null}", "{descending: 2001-01-01}", "{layers: &a [*a]}", "- a", "a: b", ".inf", "-.inf", ".nan", "1e999", "9" * 5000, "1" + "0" * 4200, "0x" + "f" * 4000, "0b1", "0o7", "1_0",
    "1:30", "1:2:3.5", "2001-01-01", "2001-99-99", "2001-01-01T25:00:00", "2001-01-01T00:00:00+99:99", "'quoted'", "'", '"',
    '"\\ud800"', '"\\U00110000"', '"\\x1b[31m"', '"\\0"', '"\\u2028"', '"\\x85"', "\ud800", "\0", "\x07", "\x85", "\u202e", "ü", "٣",
    "!!int x", "!!int ''", "!!float ''", "!!bool x", "!!timestamp x", "!!binary x", "!!binary 'é'", "!!set {a}", "!!omap [a]",
    "!!pairs [[a]]", "!!null x", "!!str 1", "!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!x y",
    "&a [*a]", "&a {b: *a}", "*a", "*b", "&b 1", "? a", "? [a]", "=", "<<", "@", "`", "%", "|", ">", "#", "--- a", "[" * 500, "{" * 500,
    "https://me:secret@host/x", "x" * 3000,
]  # fmt: skip
LINES = [
    "", "---", "...", "%YAML 9.9", "? [a]\n: 1", "1: 2", "null: 1", "2001-01-01: 1", "<<: {seed: 1}", "<<: [*a]", "&a seed: 1", "- seed",
    "seed: 1\nseed: 2", "  seed: 1", "\tseed: 1", "{seed: 1}", "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "=: 1", "!!set {seed}",
    "&a {seed: *a}", "\ufeffseed: 1", "seed: 1 # note", "? seed\n: 1", "!!map [a]: b", "9" * 5000 + ": 1",
]  # fmt: skip


def settings(pick: Pick) -> tuple[dict, list[str], bytes | None]:
    """A dict, key=value words, and a YAML file or none."""
    if pick.chance(3):
        return {}, ["=".join(_setting(pick)) for _ in range(pick.integer(0, 3))] + _odd_words(pick), None
    if pick.chance(3):
        return {_setting(pick)[0]: value(pick) for _ in range(pick.integer(1, 2))}, [], None
    lines = []
    for _ in range(pick.integer(0, 4)):
        lines.append(pick.one_of(LINES) if pick.chance(8) else ": ".join(_setting(pick)))
    data = "\n".join(lines).encode(pick.one_of(["utf-8"] * 8 + ["utf-16"]), "surrogatepass")
    return {}, [], pick.raw(100) if pick.chance(8) else _broken(pick, data) if pick.chance(8) else data


def _setting(pick: Pick) -> tuple[str, str]:
    name = pick.one_of(NEAR_NAMES) if pick.chance(20) else pick.one_of(NAMES)
    return name, pick.one_of(SCALARS if pick.chance(3) else FITTING.get(name, SCALARS))


def _odd_words(pick: Pick) -> list[str]:
    return (
        [pick.one_of(["seed", "=", "=1", " = ", "seed==1", "Seed=1", "\ud800=1", "a\nb=c"])] if pick.chance(8) else []
    )


def try_settings(given: dict, words: list[str], data: bytes | None, folder: Path, layers) -> str:
    """Build a config; one that is built can be written down and read back, and its sampler draws layers or is refused."""
    path = folder / "given.yaml"
    if data is not None:
        path.write_bytes(data)
    try:
        found = read_settings(None if data is None else str(path), words)
        config = build_config(NEEDED | given | found)
    except UserError as error:
        return refusal(error)
    for name, one in config:
        assert not isinstance(one, str) or one.isprintable() or not set(one) & set("\0\x1b\n\r\x85"), (name, one)
    write_config(config, folder / "config.yaml")
    assert build_config(read_settings(str(folder / "config.yaml"), [])) == config
    if config.method not in LAYERWISE:
        return "built"
    try:
        make_method(config).make_engine(layers).sampler(0)
    except UserError as error:
        return refusal(error)
    return "built"


# --- checkpoints

FILE_NAMES = [
    "../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "..", ".", "", "a\0b", "weights-head.safetensors\n",
    "\\..\\outside", "C:outside", ".hidden", MANIFEST, "MANIFEST.JSON", "state.json/", "x" * 300, "\ud800", "ü", "nul", "weights-head",
    "absent.safetensors", "link.safetensors", "folder.safetensors", "checkpoint-1", "../checkpoint-1/state.json", "~", "%2e%2e/x",
]  # fmt: skip


def damage(pick: Pick, folder: Path) -> None:
    """Spoil a checkpoint in one way: its bytes, its names, its kinds of file, or what it says of itself."""
    path, manifest = pick.one_of(sorted(folder.iterdir())), folder / MANIFEST
    kind = pick.integer(0, 8)
    if kind <= 1:
        data = path.read_bytes()
        path.unlink()  # its name may be one of several for the same bytes
        path.write_bytes(_broken(pick, data))
    elif kind == 2:
        path.unlink()
    elif kind == 3:
        target = pick.one_of([folder.parent / "outside.safetensors", path.with_name("moved"), Path("/dev/zero"), path])
        path.rename(path.with_name("moved"))
        path.symlink_to(target)
    elif kind == 4:
        path.unlink()
        path.mkdir()
    elif kind == 5:
        manifest.write_bytes(pick.raw(300))
    else:
        content = json.loads(manifest.read_text())
        for _ in range(pick.integer(1, 2)):
            _edit(pick, content)
        text = json.dumps(content)
        if pick.chance(6):
            place = pick.integer(0, len(text))
            text = text[:place] + pick.one_of(SPLICES) + text[place:]
        manifest.write_text(text, encoding="utf-8", errors="surrogatepass")


def _edit(pick: Pick, content: dict) -> None:
    files = content.get("files")
    kind = pick.integer(0, 7)
    if kind == 0 or not isinstance(files, dict) or not files:
        content[pick.one_of(["format", "step", "files", "more", "__class__"])] = value(pick)
        return
    name = pick.one_of(sorted(files))
    if kind == 1:
        files[name] = value(pick)
    elif kind == 2 and isinstance(files[name], dict):
        files[name][pick.one_of(["bytes", "sha256", "path"])] = value(pick)
    elif kind == 3:
        del files[name]
    elif kind <= 6:  # says what is true of the file, by a name that leads elsewhere
        files[pick.one_of(FILE_NAMES)] = files[name] if pick.chance(2) else files.pop(name)
    else:
        del content[pick.one_of(sorted(content))]


def forge(pick: Pick, folder: Path) -> None:
    """Change what a checkpoint holds and sign it anew, as whoever can write to the folder could."""
    tensors = sorted(folder.glob("*.safetensors"))
    kind = pick.integer(0, 5)
    if kind <= 2:
        state = json.loads((folder / STATE).read_text())
        _spoil(pick, state)
        (folder / STATE).write_text(json.dumps(state), encoding="utf-8", errors="surrogatepass")
    elif kind == 3:
        path = pick.one_of(tensors)
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        _spoil(pick, header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    elif kind == 4:
        path = pick.one_of(tensors)
        path.write_bytes(_broken(pick, path.read_bytes()))
    else:
        path = pick.one_of(tensors)
        path.rename(
            path.with_name(pick.one_of(["weights-head", "state-head", "weights-x.safetensors", tensors[0].name]))
        )
    sign(folder)


def sign(folder: Path) -> None:
    """Make the manifest say what is true of the files that are there."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in files.items()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _spoil(pick: Pick, tree) -> None:
    """Change something somewhere in a tree of JSON."""
    while True:
        keys = sorted(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            return
        key = pick.one_of(keys)
        if not (isinstance(tree[key], dict | list) and pick.chance(2)):
            break
        tree = tree[key]
    kind = pick.integer(0, 4)
    if kind == 0:
        del tree[key]
    elif kind == 1 and isinstance(tree, dict):
        name = pick.one_of([*WORDS, *COUNTED, key.replace("exp_avg", "step"), key.replace(":", "2:")])
        tree[name] = tree[key] if pick.chance(2) else tree.pop(key)
    elif kind == 2 and type(tree[key]) is int:
        tree[key] += pick.one_of([-100, -1, 1, 3, 2**40])
    elif kind == 3:
        other = pick.one_of(keys)
        tree[key], tree[other] = tree[other], tree[key]
    else:
        tree[key] = value(pick)


COUNTED = ["params", "lr", "num_steps", "step", "exp_avg", "position", "__metadata__", "../x"]


def try_forged(restore) -> str:
    """Go on from a forged checkpoint: what ``restore`` cannot use it refuses."""
    try:
        restore()
    except UserError as error:
        return refusal(error)
    return "restored"


def try_checkpoint(folder: Path, whole: dict[str, bytes]) -> str:
    """Read a checkpoint: it is what was written, ``whole``, or Damaged; nothing in or beside it has changed."""
    before = _everything(folder.parent)
    try:
        manifest = read_manifest(folder)
        read_state(folder)
    except Damaged as error:
        return refusal(error)
    finally:
        assert _everything(folder.parent) == before
    for name in manifest.files:
        assert (folder / name).parent == folder
        assert not (folder / name).is_symlink()
        assert (folder / name).read_bytes() == whole[name]
    return "read whole"


def _everything(folder: Path) -> dict[str, object]:
    paths = sorted(folder.rglob("*"))
    return {str(p): p.readlink() if p.is_symlink() else p.read_bytes() if p.is_file() else None for p in paths}


def copy_checkpoint(whole: dict[str, bytes], parent: Path, step: int = 1) -> Path:
    """A fresh folder of these files, with something beside it that nobody may touch."""
    shutil.rmtree(parent, ignore_errors=True)
    folder = parent / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name, data in whole.items():
        (folder / name).write_bytes(data)
    # what it would be if a manifest spoke of it, so that nothing but its place gives it away
    (parent / "outside.safetensors").write_bytes(whole[sorted(whole)[-1]])
    return folder
