"""One run, trained once for all tests of the watch page; and a folder to work in, for those of the studio."""

import shutil

import pytest

from lisatune.studio.page import studio_routes
from lisatune.studio.places import Places
from lisatune.studio.studio import Studio
from lisatune.watch.server import PageServer
from runs import run
from serving import append, lines, served
from tiny import write_rows


@pytest.fixture(scope="session")
def trained(model_folder, tmp_path_factory):
    """The folder of a real run that has ended: two of four layers, eight steps, evaluated after the fourth and the last."""
    folder = tmp_path_factory.mktemp("watched")
    run(model_folder, write_rows(folder / "rows.jsonl"), folder / "tiny", max_steps=8, eval_steps=4, samples=["Hi"])
    return folder / "tiny"


@pytest.fixture
def going(trained, tmp_path):
    """The run's folder as it was after three steps; ``grow`` writes further lines."""
    folder = shutil.copytree(trained, tmp_path / "going")
    for name in ("metrics.jsonl", "samples.jsonl", "summary.json", "report.html"):
        (folder / name).unlink()
    append(folder, lines(trained)[:4])
    return folder


@pytest.fixture(scope="session")
def made(model_folder, tmp_path_factory):
    """What a user of the studio has: a tiny model, rows, and a run that has ended."""
    folder = tmp_path_factory.mktemp("studio")
    shutil.copytree(model_folder, folder / "models" / "tiny")
    write_rows(folder / "rows.jsonl")
    run(folder / "models" / "tiny", folder / "rows.jsonl", folder / "runs" / "done", max_steps=4)
    config = folder / "runs" / "done" / "config.yaml"
    config.write_text(config.read_text().replace(f"{folder}/", ""))  # as if it had been begun here
    return folder


@pytest.fixture
def home(made, tmp_path, monkeypatch):
    """A copy of it, which is the current folder, as the command makes it."""
    folder = shutil.copytree(made, tmp_path / "home")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def studio(home):
    return Studio(Places([home]))


@pytest.fixture
def server(studio):
    token = "the-token-of-this-test"
    with served(PageServer(studio_routes(studio, token), port=0, posts=studio.posts(), token=token)) as server:
        yield server
