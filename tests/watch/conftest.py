"""One run, trained once for all tests here."""

import shutil

import pytest

from runs import run
from serving import append, lines
from tiny import write_rows


@pytest.fixture(scope="session")
def trained(model_folder, tmp_path_factory):
    """The folder of a real run that has ended: two of four layers, eight steps, evaluated after the fourth and the last."""
    folder = tmp_path_factory.mktemp("watched")
    run(model_folder, write_rows(folder / "rows.jsonl"), folder / "tiny", max_steps=8, eval_steps=4, samples=["Hi"])
    shutil.rmtree(folder / "tiny" / "model")  # a copy is soon made
    return folder / "tiny"


@pytest.fixture
def going(trained, tmp_path):
    """The run's folder as it was after three steps; ``grow`` writes further lines."""
    folder = shutil.copytree(trained, tmp_path / "going")
    for name in ("metrics.jsonl", "samples.jsonl", "summary.json", "report.html"):
        (folder / name).unlink()
    append(folder, lines(trained)[:4])
    return folder
