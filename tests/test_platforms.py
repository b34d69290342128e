"""Windows and macOS: what only Linux has is taken away, and a run goes on as before."""

import ast
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
import torch

from lisatune import UserError
from lisatune.memory import measure
from lisatune.models.load import pick_device
from lisatune.plan.forecast import plan_memory
from lisatune.run.build import settle
from lisatune.settings import build_config
from places import CHECKOUT
from runs import run, weights
from tiny import make_llama

ONLY_UNIX = ("resource", "fcntl", "pwd", "grp", "termios", "syslog", "readline")
ONLY_UNIX_SIGNALS = ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGKILL")
ONLY_UNIX_CALLS = ("sched_getaffinity", "fork", "getuid", "statvfs", "killpg", "setsid")


@pytest.fixture
def elsewhere(monkeypatch):
    """No module, signal, call or file that Windows does not have; a hard link cannot be made, as on some of its disks."""
    for name in ONLY_UNIX:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ONLY_UNIX_SIGNALS:
        monkeypatch.delattr(signal, name)
    for name in (*ONLY_UNIX_CALLS, "O_DIRECTORY"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(os, "link", lambda *a, **k: (_ for _ in ()).throw(NotImplementedError("no links")))
    read, write = Path.read_text, Path.write_text

    def without_proc(path):
        if path.is_relative_to("/proc"):
            raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", lambda path, *a, **k: without_proc(path) or read(path, *a, **k))
    monkeypatch.setattr(Path, "write_text", lambda path, *a, **k: without_proc(path) or write(path, *a, **k))


def test_a_run_is_trained_saved_and_resumed_without_what_only_linux_has(elsewhere, model_folder, data_file, tmp_path):
    settings = {"save_steps": 2, "max_steps": 4}
    summary, _ = run(model_folder, data_file, tmp_path / "whole", **settings)
    assert summary["peak_bytes"] > 2**20
    run(model_folder, data_file, tmp_path / "half", stop_after=3, **settings)
    run(model_folder, data_file, tmp_path / "half", resume=True, **settings)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "half")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_peak_on_windows_is_psutils(elsewhere):
    held = torch.ones(2**24)
    assert measure._resident_bytes("VmHWM") > held.nbytes
    assert 0.5 < measure._resident_bytes("VmRSS") / psutil.Process().memory_info().rss < 2


def unguarded(tree):
    """What a module takes from Unix outside of a ``try`` that expects to miss it."""
    if isinstance(tree, ast.Try) and "ImportError" in {getattr(handler.type, "id", "") for handler in tree.handlers}:
        return
    if isinstance(tree, ast.Import):
        yield from (name.name for name in tree.names if name.name in ONLY_UNIX)
    if isinstance(tree, ast.ImportFrom) and tree.module in ONLY_UNIX:
        yield tree.module
    if isinstance(tree, ast.Attribute) and tree.attr in (*ONLY_UNIX_SIGNALS, *ONLY_UNIX_CALLS):
        yield tree.attr
    for child in ast.iter_child_nodes(tree):
        yield from unguarded(child)


def test_no_module_takes_from_unix_alone():
    sources = sorted((CHECKOUT / "src").rglob("*.py"))
    assert {str(path): found for path in sources if (found := [*unguarded(ast.parse(path.read_text()))])} == {}
    assert [*unguarded(ast.parse("import fcntl\nsignal.SIGKILL\nos.fork()"))] == ["fcntl", "SIGKILL", "fork"]


@pytest.mark.parametrize(("cuda", "mps", "expected"), [(1, 1, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_auto_takes_the_gpu_that_is_there(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    assert pick_device("auto").type == expected


def test_a_run_on_a_mac_is_planned_in_float32_and_refuses_what_mps_cannot(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    places = {"model": "m", "data": "d", "output": "o"}
    config, device = settle(build_config(places))
    assert (config.dtype, config.device, device.type) == ("float32", "mps", "mps")
    with pytest.raises(UserError, match="norm_steps needs float64, which MPS does not have: set device=cpu"):
        settle(build_config(places | {"norm_steps": 1}))
    plan = plan_memory(make_llama().config, device="mps", max_length=8, per_device_train_batch_size=1)
    assert "No forecast was compared with a Mac" in str(plan)
