"""``lisatune watch``: what its server tells of runs, and what it does not."""

import gzip
import json
import os
import shlex
import shutil
import signal
import socket
import sys
import urllib.request
from urllib.parse import quote

import pytest

from hostile import SPLICES, WORDS
from lisatune import UserError
from lisatune.settings import build_config, read_settings
from lisatune.watch.page import routes_of
from lisatune.watch.runs import Runs
from lisatune.watch.server import PageServer
from patience import HANG_SECONDS, started
from serving import EVIL, append, get, lines, served
from typed import typed


@pytest.fixture(scope="module")
def still(trained):
    """A server of the run that has ended, for questions that change nothing."""
    with served(PageServer(routes_of(Runs([trained])), port=0)) as server:
        yield server


@pytest.fixture
def serve():
    """A server of the runs in some folders."""
    opened = []

    def begin(*folders, host="127.0.0.1"):
        context = served(PageServer(routes_of(Runs(folders)), host, 0))
        opened.append(context)
        return context.__enter__()

    yield begin
    for context in opened:
        context.__exit__(None, None, None)


def news(server, known=None):
    answer = get(server, f"/news?known={quote(json.dumps(known or {}))}")
    assert answer.status == 200
    return json.loads(answer.body)["runs"]


def known_of(told):
    return {one["id"]: one["known"] for one in told}


def steps_of(one):
    return [row["step"] for row in one.get("rows", [])]


# --- what is told


def test_a_run_that_has_ended_is_told_whole(serve, trained):
    (one,) = news(serve(trained))
    facts, rows = one["facts"], [json.loads(line) for line in lines(trained)]
    assert one["name"] == "tiny"
    assert facts["state"] == "finished"
    assert facts["summary"]["eval_loss_after"] == pytest.approx(rows[-1]["eval_loss"], rel=1e-5)
    assert steps_of(one) == list(range(9))
    assert [row["loss"] for row in one["rows"][1:]] == pytest.approx([row["loss"] for row in rows[1:]], rel=1e-5)
    assert [row["active_layers"] for row in one["rows"][1:]] == [row["active_layers"] for row in rows[1:]]
    assert [row["step"] for row in one["rows"] if "eval" in row] == [0, 4, 8]
    first = one["rows"][0]
    assert first["run"]["steps"] == 8
    assert first["process"]["base_bytes"] == json.loads((trained / "summary.json").read_text())["base_bytes"]
    assert first["plan"]["peak_bytes"] == rows[0]["plan"]["peak_bytes"]
    assert [(row["step"], row["prompt"]) for row in one["samples"]] == [(0, "Hi"), (4, "Hi"), (8, "Hi")]
    assert facts["config"] == (trained / "config.yaml").read_text()


def test_the_command_that_is_shown_gives_the_same_settings(serve, trained):
    words = shlex.split(news(serve(trained))[0]["facts"]["command"])
    assert words[:2] == ["lisatune", "train"]
    options = dict(zip(words[2:8:2], words[3:8:2], strict=True))
    again = build_config({name[2:]: value for name, value in options.items()} | read_settings(None, words[8:]))
    assert again == build_config(read_settings(str(trained / "config.yaml"), []))
    assert len(words) < 20


def test_the_page_grows_by_what_is_new(serve, trained, going):
    server = serve(going)
    (one,) = told = news(server)
    assert steps_of(one) == [0, 1, 2, 3]
    assert one["facts"]["state"] == "begun"
    quiet = get(server, f"/news?known={quote(json.dumps(known_of(told)))}")
    assert len(quiet.body) < 200
    (one,) = told = news(server, known_of(told))
    assert "rows" not in one
    assert "facts" not in one

    append(going, [lines(trained)[4], lines(trained)[5][:40]])  # the second one is being written
    (one,) = told = news(server, known_of(told))
    assert steps_of(one) == [4]
    append(going, [lines(trained)[5][40:], *lines(trained)[6:]])
    append(going, [{"step": 8, "prompt": "Hi", "answer": "Ho"}], name="samples.jsonl")
    shutil.copy(trained / "summary.json", going)
    (one,) = told = news(server, known_of(told))
    assert steps_of(one) == [5, 6, 7, 8]
    assert one["samples"] == [{"step": 8, "prompt": "Hi", "answer": "Ho"}]
    assert one["facts"]["state"] == "finished"
    assert "anew" not in one


def test_a_resumed_run_takes_its_lines_back(serve, trained, going):
    server = serve(going)
    told = news(server)
    (going / "metrics.jsonl").write_text("".join(lines(trained)[:2]) + '{"step": 2, "loss": 9.5}\n')
    (one,) = news(server, known_of(told))
    assert one["anew"] == ["rows"]
    assert steps_of(one) == [0, 1, 2]
    assert one["rows"][-1]["loss"] == 9.5


def test_a_long_run_comes_in_parts(serve, going):
    append(going, [{"step": step, "loss": 1.0, "more": "x" * 200} for step in range(4, 3000)])
    server, known, found, asked = serve(going), {}, [], 0
    while True:
        answer = json.loads(get(server, f"/news?known={quote(json.dumps(known))}").body)
        found += steps_of(answer["runs"][0])
        known, asked = known_of(answer["runs"]), asked + 1
        if not answer["more"]:
            break
    assert found == list(range(3000))
    assert asked == 3


def test_a_comparison_shows_runs_that_go_on_wait_and_have_failed(serve, trained, tmp_path):
    folder = tmp_path / "grid"
    (folder / "runs").mkdir(parents=True)
    (folder / "comparison.yaml").write_text("")
    (folder / "comparison.json").write_text(
        json.dumps({"runs": [{"name": "b", "failure": "no memory"}, {"name": 1}, 2]})
    )
    for name in "abc":
        (folder / "runs" / f"{name}.yaml").write_text("")
    shutil.copytree(trained, folder / "runs" / "a")
    server = serve(folder)
    told = news(server)
    assert [(one["name"], one["facts"]["state"]) for one in told] == [
        ("a", "finished"),
        ("b", "failed"),
        ("c", "waiting"),
    ]
    assert told[1]["facts"]["failure"] == "no memory"
    shutil.copytree(trained, folder / "runs" / "c")
    assert [one.get("facts", {}).get("state") for one in news(server, known_of(told))] == [None, None, "finished"]


def test_runs_of_one_name_are_told_apart(serve, trained, tmp_path):
    for name in ("x/run", "y/run", "y/other"):
        shutil.copytree(trained, tmp_path / name)
    assert [one["name"] for one in news(serve(tmp_path / "x" / "run", tmp_path / "y"))] == ["x/run", "other", "y/run"]


def test_answers_are_compressed_for_who_can_read_it(serve, trained):
    server = serve(trained)
    plain, packed = get(server, "/news"), get(server, "/news", Accept_Encoding="br, gzip")
    assert json.loads(gzip.decompress(packed.body))["runs"][0]["rows"] == json.loads(plain.body)["runs"][0]["rows"]
    assert len(packed.body) < len(plain.body) / 2


def test_nothing_is_written(serve, going):
    def everything():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [going, *going.rglob("*")]}

    before = everything()
    server = serve(going)
    for path in ("/", "/watch.js", "/news"):
        assert get(server, path).status == 200
    assert everything() == before


# --- who is let in


def test_the_page_loads_nothing_from_elsewhere(serve, trained):
    server = serve(trained)
    for path in ("/", "/watch.js", "/draw.js", "/watch.css"):
        answer = get(server, path)
        assert "default-src 'none'; script-src 'self'" in answer.headers["Content-Security-Policy"]
        text = answer.body.decode().replace("http://www.w3.org/2000/svg", "")
        assert not any(word in text for word in ("http:", "https:", '"//', "innerHTML", "@import"))
    assert all(name not in get(server, "/news").headers for name in ("Access-Control-Allow-Origin", "Set-Cookie"))


def test_other_machines_need_the_token(serve, trained):
    server = serve(trained, host="0.0.0.0")
    token = server.token
    assert len(token) >= 40
    assert server.url.endswith(f":{server.server_address[1]}/?token={token}")
    for path in ("/", "/news", "/watch.js", "/nothing"):
        for wrong in ("", f"?token={token[:-1]}", f"?token={token}x", "?token=", "?token=%C3%A9", f"?tokens={token}"):
            answer = get(server, path + wrong)
            assert answer.status == 401
            assert "Set-Cookie" not in answer.headers
            assert b"tiny" not in answer.body
    opened = get(server, f"/?token={token}")
    assert opened.status == 200
    cookie = opened.headers["Set-Cookie"]
    assert "HttpOnly; SameSite=Strict" in cookie
    assert get(server, "/news", Cookie=cookie.partition(";")[0]).status == 200
    assert get(server, "/news", Cookie=cookie.partition(";")[0][:-1]).status == 401
    assert get(server, "/news", Cookie='"=;;\x01').status == 401
    assert get(server, "/news", Authorization=f"Bearer {token}").status == 200


def test_this_machine_needs_none(serve, trained):
    server = serve(trained)
    assert server.token is None
    assert server.server_address[0] == "127.0.0.1"
    assert "token" not in server.url


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8421", "localhost.evil.example", "", "127.0.0.1.evil.example", "[::1", "a@b:1"],
)
def test_a_name_that_others_lead_here_is_refused(still, host):
    answer = get(still, "/news", Host=host)
    assert answer.status == 421
    assert b"tiny" not in answer.body


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:9", "localhost.", "127.0.0.1:80", "[::1]:7", socket.gethostname()]
)
def test_our_own_names_are_known_by_any_port(still, host):
    assert get(still, "/news", Host=host).status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD", "CONNECT"])
def test_one_can_only_ask(still, method):
    assert get(still, "/news", method=method).status >= 400


# --- what cannot be read

PATHS = [
    "/../secret", "/%2e%2e/secret", "/..%2fsecret", "/....//secret", "//secret", "/watch.css/../../secret", "/\\..\\secret", "secret",
    "/news/../secret", "/tiny/metrics.jsonl", "/config.yaml", "/server.py", "/watch.js%00", "/%ff", "*", "http://evil.example/news",
    "//[", "/?" + "&".join(f"a{i}=1" for i in range(50)),
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=ascii)
def test_no_file_is_reached_by_its_path(still, trained, path):
    (trained.parent / "secret").write_text("my secret")
    answer = get(still, path)
    assert answer.status in (400, 404, 421)
    assert b"secret" not in answer.body


@pytest.mark.parametrize(
    "known", ["", "[1]", "{", '{"x": "../../secret/0-00000000"}', "null", "[" * 9999, "9" * 5000], ids=range(7)
)
def test_what_the_page_says_it_knows_is_no_path(still, known):
    assert get(still, f"/news?known={quote(known)}").status == 200


@pytest.mark.parametrize(
    "place", ["../../secret", "9" * 15 + "-00000000", "-1-00000000", "1-zz", "5-00000000", "\0", "/" * 50], ids=ascii
)
def test_a_place_that_was_never_told_reads_from_the_beginning(still, place):
    (one,) = news(still)
    (again,) = news(still, {one["id"]: f"{place}/{place}/x"})
    assert again["rows"] == one["rows"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "config.yaml", "summary.json", "answers.json"])
def test_no_link_and_no_pipe_is_followed(serve, going, tmp_path, name):
    outside = {
        "step": 5,
        "prompt": "my secret",
        "answer": "my secret",
        "layers": "my secret",
        "method": "my secret",
        "question": "my secret",
    }
    (tmp_path / "outside").write_text(json.dumps(outside) + "\n")
    server = serve(going)
    path = going / name
    for make in (lambda: path.symlink_to(tmp_path / "outside"), lambda: os.mkfifo(path), path.mkdir):
        path.unlink(missing_ok=True)
        make()
        assert "my secret" not in json.dumps(news(server))


def test_a_folder_that_is_a_link_is_not_a_run_of_the_folder_it_is_in(serve, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "in" / "mine")
    (tmp_path / "in" / "theirs").symlink_to(trained)
    assert [one["name"] for one in news(serve(tmp_path / "in"))] == ["mine"]


# --- hostile runs


def test_lines_that_are_none_are_left_out(serve, trained, going):
    others = [*SPLICES, *WORDS, "5", '{"step": 1e999}', '{"step": NaN, "loss": Infinity}', '{"step": true}', "\xff\0"]
    append(going, [one.encode(errors="replace").decode() + "\n" for one in others] + [lines(trained)[4]])
    (one,) = news(serve(going))
    assert steps_of(one) == [0, 1, 2, 3, 4]


def test_values_of_other_types_and_sizes_are_left_out(serve, going):
    row = {"step": 4, "loss": "x", "tokens": 2**70, "active_layers": [[1], "2", 3], "scores": {EVIL: 0.5, "a": "b"}, "sampled_parts": [EVIL, 1],
           "plan": [1], "run": {"steps": {}}, "layers": "x" * 10**5, "eval_loss": None}  # fmt: skip
    append(going, [row])
    (one,) = news(serve(going))
    told = one["rows"][-1]
    assert len(told.pop("layers")) < 30_000
    assert told == {"step": 4, "active_layers": [3], "scores": {EVIL: 0.5}, "sampled_parts": [EVIL], "run": {}}


# settings of 20 KB that stand for nine million values
WIDE = f"{{a: &a [{', '.join(['1'] * 3000)}], b: [{', '.join(['*a'] * 3000)}]}}"
BOMB = f"model: m\ndata: d\noutput: o\nsampler: weighted\nsampler_options: {{weights: {WIDE}}}"


BROKEN = [
    "",
    "[]",
    "5",
    "model: !!python/name:os.system",
    "\0",
    "[" * 500,
    BOMB,
    "x: " + "y" * 10**6,
    "- a",
    "method: 7\nseed: {a: [1]}",
    "\xff",
]


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "answers.json"])
def test_a_broken_run_is_told_as_far_as_it_can_be_read(serve, going, name):
    server = serve(going)
    for content in BROKEN:
        (going / name).write_text(content)
        (one,) = news(server)
        assert steps_of(one) == [0, 1, 2, 3]
        assert len(json.dumps(one["facts"])) < 10**5


def test_one_that_says_nothing_or_goes_away_holds_nobody_up(serve, trained):
    server = serve(trained)
    with socket.create_connection(server.server_address), socket.create_connection(server.server_address) as other:
        other.sendall(b"GET /news HTTP/1.1\r\nHost: localhost\r\n\r\n")
        other.shutdown(socket.SHUT_RDWR)
        assert len(news(server)) == 1


# --- the command


def test_a_folder_is_watched_before_its_run_begins(serve, trained, tmp_path):
    """A run loads its model before it writes anything; who starts both at once should not be refused."""
    later = tmp_path / "later"
    server = serve(later)
    assert Runs([later, trained]).without_runs() == [later]
    assert news(server) == []
    shutil.copytree(trained, later)
    assert [one["name"] for one in news(server)] == ["later"]


def test_a_file_is_refused(trained):
    with pytest.raises(UserError, match=r"config.yaml is a file: give the output folder of lisatune train or compare"):
        Runs([trained / "config.yaml"])


def test_the_command_says_where_no_run_has_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(PageServer, "serve_forever", lambda self: None)
    done = typed("watch", tmp_path, "--port", "0")
    assert done.returncode == 0
    assert (
        done.stderr
        == f"{tmp_path}: no run has begun there yet; the page shows it when it does\nwatching 0 runs; Ctrl-C ends it\n"
    )


def test_a_port_that_is_taken_is_refused(serve, trained):
    port = serve(trained).server_address[1]
    done = typed("watch", trained, "--port", port)
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"lisatune: cannot listen on 127.0.0.1, port {port} (Address already in use): choose another"
    )


def test_the_command_prints_where_the_page_is(trained, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    words = [sys.executable, "-m", "lisatune", "watch", trained, "--port", "0"]
    with started(words, stdout=-1, stderr=-1, env=os.environ | {"PYTHONPATH": path}) as process:
        url = process.stdout.readline().strip()
        with urllib.request.urlopen(url) as page:
            assert b"<h1>lisatune watch</h1>" in page.read()
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0
    assert told == "watching 1 run; Ctrl-C ends it\n"
