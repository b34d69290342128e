"""What peers.py and startup.py reckon with: who runs when, what a run's output tells, and whose time it is."""

import importlib
import json
import sys
import time
from pathlib import Path

import pytest

from places import CHECKOUT


@pytest.fixture(scope="module")
def modules():
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(CHECKOUT / "benchmarks"))
    patch.setenv("STARTED_AT", "0")
    yield {name: importlib.import_module(name) for name in ("peers", "peers_tools", "startup")}
    patch.undo()


@pytest.fixture
def job(modules, tmp_path):
    """A job of four steps, whose rows and model are there."""
    rows, model = tmp_path / "rows.jsonl", tmp_path / "model"
    rows.write_text(
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"
    )
    model.mkdir()
    shape = {
        "vocab_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_size": 4,
    }
    shape |= {
        "max_position_embeddings": 16,
        "intermediate_size": 8,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 1e4},
    }
    (model / "config.json").write_text(json.dumps(shape))
    return modules["peers_tools"].Job(Path("bin"), tmp_path / "job", model, rows, "lora", 4)


def test_lisatune_runs_before_between_and_after_the_others(modules):
    order = [name for name, _ in modules["peers"].turns("lora", ["lisatune", "TRL", "ms-swift", "torchtune"], 1)]
    assert order == ["lisatune", "TRL", "ms-swift", "lisatune", "torchtune", "lisatune"]


def test_each_run_has_a_name_of_its_own_in_each_round(modules):
    labels = [label for _, label in modules["peers"].turns("full", ["lisatune", "TRL", "ms-swift"], 3)]
    assert len(set(labels)) == len(labels) == 3 * 5


def test_only_tools_that_have_a_method_are_compared_in_it(modules):
    assert {name for name, _ in modules["peers"].turns("lisa", ["lisatune", "TRL", "ms-swift"], 1)} == {
        "lisatune",
        "ms-swift",
    }


def test_a_run_is_read_from_what_it_prints(modules, job):
    """A real process, with a child that does part of the work."""
    script = (
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', 'sum(range(10**6))'])\n"
        "for loss in (3, 2.5, 2, 1e-1): print({'loss': str(loss), 'grad_norm': '9.0'}, flush=True)\n"
    )
    tool = modules["peers_tools"].Tool(("lora",), lambda _: [sys.executable, "-c", script], ())
    found = modules["peers"].run(tool, job, 1)
    assert found["losses"] == [3.0, 2.5, 2.0, 0.1]
    assert found["peak_bytes"] > 2**20
    assert 0 < found["processor"] <= found["wall"] * 8


def test_a_run_that_fails_is_its_first_error(modules, job):
    script = "print('so far so good'); raise ValueError('no such template: x')"
    tool = modules["peers_tools"].Tool(("lora",), lambda _: [sys.executable, "-c", script], ())
    assert modules["peers"].run(tool, job, 1) == {"error": "ValueError: no such template: x"}


def test_a_run_that_ends_early_is_no_result(modules, job):
    script = "print({'loss': '1.0'}); print('stopped')"
    tool = modules["peers_tools"].Tool(("lora",), lambda _: [sys.executable, "-c", script], ())
    assert modules["peers"].run(tool, job, 1) == {"error": "stopped"}


def test_step_is_the_median_without_the_first_ones(modules):
    marks = [[10.0, 5.0], [30.0, 9.0], [31.0, 9.5], [32.0, 10.0], [39.0, 10.5]]
    assert modules["peers"].step_of([{"marks": marks}], 0) == 1.0
    assert modules["peers"].step_of([{"marks": marks}], 1) == 0.5


def test_every_tool_is_asked_for_the_same(modules, job):
    for name, tool in modules["peers_tools"].TOOLS.items():
        for method in tool.methods:
            folder = job.folder / name / method
            folder.mkdir(parents=True)
            own = modules["peers_tools"].Job(job.bin, folder, job.model, job.rows, method, job.steps)
            asked = " ".join(tool.command(own)) + "".join(f.read_text() for f in folder.rglob("*") if f.is_file())
            for wanted in (str(job.model), "256", "0.0001"):
                assert wanted in asked, (name, method, wanted)


def test_a_moment_belongs_to_the_innermost_part(modules):
    """Each part gets at least the time that was spent in it, and all together no more than passed."""

    def wait() -> None:
        until = time.monotonic() + 0.02
        while time.monotonic() < until:
            pass

    clock, begun = modules["startup"].Clock(), time.monotonic()
    clock.since = [time.process_time(), begun]
    wait()
    with clock.part("outer"):
        wait()
        with clock.part("inner"):
            wait()
    walls = [wall for _, wall in clock.spent.values()]
    assert list(clock.spent) == ["Python itself", "outer", "inner"]
    assert min(walls) >= 0.02
    assert sum(walls) <= time.monotonic() - begun
