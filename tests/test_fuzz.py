"""Bad input, some hundred cases of it, ten thousand among the slow tests: an answer or a UserError, never a traceback; no row is lost in silence."""

import contextlib
import gzip
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hostile
from forged import make_learner, real_files, small_files, try_forged
from lisatune import UserError
from lisatune.assemble import make_method
from lisatune.common.run_folder import check_output
from lisatune.data.formats import parse_row, read_rows
from lisatune.data.tokenize import Encoder
from lisatune.layers import find_layers
from lisatune.models.names import check_model_name
from lisatune.run.checkpoint import Checkpoints, Damaged, read_manifest, read_state
from lisatune.run.snapshot import Snapshots
from lisatune.settings import build_config, read_settings
from tiny import make_llama

CASES = {"row": 3500, "file": 2500, "settings": 2500, "checkpoint": 1500, "forged": 150}


class Drawn(hostile.Pick):
    """Choices of hypothesis."""

    def __init__(self, data):
        self.data = data

    def integer(self, low, high):
        return self.data.draw(st.integers(low, high))

    def raw(self, most):
        return self.data.draw(st.binary(max_size=most))


def amounts(name):
    """A thirtieth of the cases each time, and all of them, which takes minutes, among the slow tests."""
    few, all_cases = (
        pytest.param(CASES[name] // 30, id="some"),
        pytest.param(CASES[name], id="all", marks=pytest.mark.slow),
    )
    return pytest.mark.parametrize("count", [few, all_cases])


def fuzz(count, case):
    """Call ``case`` with ``count`` ways to choose."""

    @settings(max_examples=count, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data):
        case(Drawn(data))

    check()


@pytest.fixture(scope="module")
def folder():
    """In memory where there is such a place, because a disk is slow for thousands of files."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as path:
        yield Path(path)


def test_there_are_ten_thousand_cases():
    assert sum(CASES.values()) >= 10_000


@amounts("row")
def test_any_row_is_read_or_refused(count):
    def case(pick):
        columns = hostile.row(pick)
        if isinstance(columns, dict):
            hostile.try_row(columns)

    fuzz(count, case)


@amounts("file")
def test_any_file_is_read_or_refused_and_its_rows_add_up(folder, tokenizer, count):
    def case(pick):
        name, content = hostile.row_file(pick)
        (folder / name).write_bytes(content)
        hostile.try_rows(folder / name, lambda: Encoder(tokenizer, 40))

    fuzz(count, case)


@amounts("settings")
def test_any_settings_build_a_config_or_are_refused(folder, layers, count):
    fuzz(count, lambda pick: hostile.try_settings(*hostile.settings(pick), folder, layers))


@pytest.fixture(scope="module")
def layers():
    return find_layers(make_llama())


@pytest.fixture(scope="module")
def small():
    return small_files()


@pytest.fixture(scope="module")
def real():
    return real_files()


@amounts("checkpoint")
def test_any_damage_to_a_checkpoint_is_told_and_nothing_else_is_touched(folder, small, count):
    def case(pick):
        place = hostile.copy_checkpoint(small, folder / "run")
        hostile.damage(pick, place)
        hostile.try_checkpoint(place, small)

    fuzz(count, case)


@amounts("forged")
def test_a_checkpoint_that_is_whole_but_forged_is_used_or_refused(folder, real, count):
    fuzz(count, lambda pick: try_forged(pick, real, folder))


PART = b'{"text": "a"}'
HOLES = {
    "half of a character": ("rows.jsonl", b'{"text": "a\\ud800b"}', r"line 1: 'text' holds \\ud800, half of a character"),
    "half of a character in a chat": ("rows.jsonl", b'{"messages": [{"role": "user", "content": "\\udfff"}]}', r"'content' holds \\udfff"),
    "a number too long": ("rows.jsonl", PART + b'\n{"text": ' + b"9" * 5000 + b"}", "line 2: a number has too many digits"),
    "a role that is a list": ("rows.jsonl", b'{"messages": [{"role": ["user"], "content": "a"}]}', "turn 1 has role a list"),
    "a name that appears twice": ("rows.jsonl", b'{"text": "a", "text": "b"}', "line 1: 'text' appears twice"),
    "a name as long as a row": ("rows.jsonl", b'{"' + b"x" * 9999 + b'": 1}', r"columns x{60}\.\.\. are not recognised"),
    "a chat that nobody begins": ("rows.jsonl", b'{"messages": [{"role": "assistant", "content": "a"}]}', "begins with an assistant turn"),
    "gzip that breaks off inside": ("rows.jsonl.gz", gzip.compress(PART * 99)[:20] + b"\xff" * 20, "is it a whole gzip file"),
    "no text in line 3": ("rows.jsonl", PART + b"\n" + PART + b"\n\xff\n", "is not UTF-8 text .* in line 3"),
    "half of a byte order mark": ("rows.jsonl", b"\xef\xbb", "is not UTF-8 text"),
}  # fmt: skip


@pytest.mark.parametrize("hole", HOLES)
def test_holes_that_were_found_stay_closed(tmp_path, hole):
    name, content, message = HOLES[hole]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(map(parse_row, read_rows(str(tmp_path / name))))


def test_a_byte_order_mark_is_no_part_of_a_row(tmp_path):
    for name, content in [("rows.jsonl", PART), ("rows.json", b"[" + PART + b"]")]:
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
        assert [row.columns for row in read_rows(str(tmp_path / name))] == [{"text": "a"}]


def test_no_file_of_a_folder_is_passed_by_in_silence(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_bytes(PART)
    (tmp_path / "more").mkdir()

    def link(name, target):
        (tmp_path / "data" / name).symlink_to(target)

    for make, message in [
        (lambda: link("b", tmp_path / "more"), "a link to another folder is not followed"),
        (lambda: link("b.jsonl", "nowhere"), "b.jsonl: cannot be read"),
        (lambda: os.mkfifo(tmp_path / "data" / "b.jsonl"), "b.jsonl: not a regular file"),
    ]:
        make()
        with pytest.raises(UserError, match=message):
            list(read_rows(str(tmp_path / "data")))
        next((tmp_path / "data").glob("b*")).unlink()
    assert len(list(read_rows(str(tmp_path / "data")))) == 1


def test_a_folder_that_may_not_be_read_is_no_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    scan = os.scandir

    def forbid(path):
        if Path(path).name == "inner":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", forbid)  # root may read everything, so its bits would not do
    with pytest.raises(UserError, match="Permission denied"):
        list(read_rows(str(tmp_path)))


@pytest.mark.parametrize(
    "name", ["", " ", "x" * 5000, "/" + "x" * 300 + "/y", "~nobody-of-this-name/x", "a\0b", "\ud800"]
)
def test_names_that_no_file_can_have(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_bytes(PART)  # what an empty name must not stand for
    with pytest.raises(UserError):
        list(read_rows(name))
    for look in (lambda: read_settings(name, []), lambda: check_model_name(name), lambda: check_output(Path(name))):
        with contextlib.suppress(UserError):
            look()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: " + "[" * 2000, "nested too deep"),
        ("seed: 2001-99-99", "a value is not what its form says, month must be"),
        ("seed: !!int ''", "not what its form says"),
        ("seed: !!bool x", "not what its form says"),
        ("seed: " + "9" * 5000, "not what its form says"),
        ("seed: 0x" + "f" * 5000, "seed=a number of too many digits: "),
        ("? 0x" + "f" * 5000 + "\n: 1", "unknown setting a number of too many digits"),
        ("seed: 9223372036854775808", "seed=9223372036854775808: input should be"),
        ("seed: true", "seed=True: input should be a number"),
        ("seed: 1\nseed: 2", "line 2: not valid YAML .'seed' is given twice"),
        ("<<: {seed: 1}", "<< is not for settings"),
        ("learning_rate: .inf", "finite number"),
        ("model: &a [*a]", r"model=\[\[\[\.\.\.\]\]\]: input should be"),
        ('model: "\\e[31m"', "holds a character that cannot be printed"),
        ("model: ''", "model=''"),
        ('"a\\e[31mb": 1', r"unknown setting 'a\\x1b\[31mb'"),
        ("sampler: fixed\nsampler_options: {layers: 5}", "sampler fixed cannot be made with these options"),
        ("sampler: gradient_norm\nsampler_options: {temperature: x}", "sampler gradient_norm cannot be made"),
        ("sampler_options: {seed: 1}", "sampler_options: seed"),
        ("sampler: fixed\nsampler_options: &a {layers: [*a]}", "a short list of these"),
    ],
)
def test_settings_that_were_holes_are_refused_in_words(folder, layers, text, message):
    (folder / "holes.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        make_method(build_config(hostile.NEEDED | read_settings(str(folder / "holes.yaml"), []))).make_engine(layers)
    hostile.refusal(caught.value)


NO_OBJECTS = ["", "[]", "5", "{", "[" * 99_999, '{"a": ' + "9" * 5000 + "}", "\0", "\ud800"]


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
@pytest.mark.parametrize("content", NO_OBJECTS)
def test_what_is_no_manifest_or_state_is_damage(folder, small, name, content):
    place = hostile.copy_checkpoint(small, folder / "run")
    (place / name).write_text(content, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(Damaged):
        read_manifest(place)
    if name == "state.json":
        with pytest.raises(Damaged):
            read_state(place)


@pytest.mark.parametrize(
    ("path", "new"),
    [
        (["standing", "position"], [0, -1, 0]),
        (["standing", "position"], [0, 2**70, 0]),
        (["standing", "step"], 2),
        (["standing", "tokens"], 10**4000),
        (["drawn"], [99]),
        (["drawn"], None),
        (["sampler"], {"scores": []}),
        (["counters"], [{"num_steps": "x"}]),
    ],
)
def test_a_state_that_no_run_can_be_in_is_damage(folder, real, path, new):
    place = hostile.copy_checkpoint(real, folder / "forged" / "checkpoints", step=3)
    state = json.loads((place / "state.json").read_text())
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    (place / "state.json").write_text(json.dumps(state))
    hostile.sign(place)
    checkpoints = Checkpoints(folder / "forged")
    with pytest.raises(Damaged):
        Snapshots(make_learner(), checkpoints, {}, {}).restore(checkpoints.latest(print))
