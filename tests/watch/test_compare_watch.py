"""``lisatune compare --watch``: the page of its grid while the runs train."""

import json
import re
import socket
import sys
from contextlib import ExitStack, suppress
from functools import partial

import pytest

from lisatune import UserError
from lisatune.cli.watch import watched
from lisatune.compare import runner
from lisatune.train import train
from lisatune.watch.server import PORT, PageServer
from patience import wait_until
from serving import get, served
from tiny import write_rows
from typed import typed


def page_of(told):
    """The server that ``told`` names, as ``get`` takes it."""
    url = re.search(r"watch it: http://127.0.0.1:(\d+)/\n", told)
    server = type("Server", (), {"server_address": ("127.0.0.1", int(url[1]))})
    return partial(get, server)


def test_the_page_shows_the_grid_while_it_runs(model_folder, tmp_path, monkeypatch):
    seen = []

    def look_then_train(trial, folder, stop, tick):
        page = page_of(sys.stderr.getvalue())
        runs = json.loads(page("/news").body)["runs"]
        seen.append((page, {run["name"]: run["facts"]["state"] for run in runs}))
        train(trial.config, console=quiet, resume=True)
        return ""

    quiet = runner.Console(quiet=True)
    monkeypatch.setattr(runner, "compare", partial(runner.compare, run_one=look_then_train))
    monkeypatch.setattr(runner, "_write_page", lambda folder, console: None)
    done = typed(
        "compare", "--model", model_folder, "--data", write_rows(tmp_path / "rows.jsonl"), "--output", tmp_path / "cmp",
        "--watch", "--json", "learning_rate=1e-3", "seed=0,1", "max_steps=2", "eval_rows=4", "max_length=64",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["finished"]) == 2
    assert [list(states.values()) for _, states in seen] == [["waiting", "waiting"], ["finished", "waiting"]]
    with pytest.raises(ConnectionRefusedError):
        seen[0][0]("/news")


def test_another_port_is_taken_where_the_usual_one_is_not_free(tmp_path, capsys):
    with ExitStack() as other:
        with suppress(UserError):  # it is taken anyway
            other.enter_context(PageServer({}, port=PORT))
        with watched(tmp_path / "not there yet"):
            page = page_of(capsys.readouterr().err)
            assert json.loads(page("/news").body) == {"runs": [], "more": False}
            assert page.args[0].server_address[1] != PORT


def test_a_comparison_goes_on_without_a_page(tmp_path, monkeypatch, capsys):
    def refuse(*args, **options):
        raise UserError("no")

    monkeypatch.setattr("lisatune.watch.server.PageServer", refuse)
    with watched(tmp_path):
        assert "no page, because no port is free; later: lisatune watch" in capsys.readouterr().err


def test_clients_cannot_use_up_the_files_of_the_process(monkeypatch):
    monkeypatch.setattr("lisatune.watch.server.MOST_CONNECTIONS", 3)
    with served(PageServer({}, port=0)) as server, ExitStack() as clients:
        *let_in, refused = [
            clients.enter_context(socket.create_connection(server.server_address[:2])) for _ in range(4)
        ]
        told = b""
        with suppress(ConnectionError):
            refused.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            told = refused.recv(100)
        assert told == b"", "one more than there is room for gets no answer"
        for client in let_in:
            client.close()

        def answers():
            with suppress(OSError):
                return get(server, "/").status == 404

        wait_until(answers)
