"""Equal runs give equal bits where it was asked for, and to rounding where it was not."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from lisatune.errors import UserError
from lisatune.run.determinism import blas, has_mkl, mkl_mode, uneven_products
from patience import HANG_SECONDS
from places import CHECKOUT
from runs import metrics, run, weights

with_mkl = pytest.mark.skipif(not has_mkl(), reason="PyTorch is built without MKL here")


def python(*words, **environment):
    """Python in a process of its own, where MKL multiplies as it likes unless ``environment`` says something else."""
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=HANG_SECONDS, stdin=subprocess.DEVNULL,
        env=os.environ | {"MKL_CBWR": "", "COLUMNS": "300", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def train(model_folder, data_file, output, *words):
    settings = ("max_steps=8", "max_length=64", "num_active=1", "interval_steps=3", "save_steps=5", "eval_rows=6")
    return python(
        "-m", "lisatune", "train", "--model", model_folder, "--data", data_file, "--output", output, *settings, *words
    )


@with_mkl
def test_in_the_tests_mode_products_depend_on_the_numbers_alone():
    assert mkl_mode() in ("COMPATIBLE", None)
    assert "MKL" in blas()
    assert not list(uneven_products())


def test_a_full_determinism_run_of_the_command_is_resumed_in_a_new_process_to_the_bit(
    model_folder, data_file, memory_path
):
    """The command asks MKL before torch is loaded, and the run's first line says that it was heard."""
    asked = "full_determinism=true"
    done = train(model_folder, data_file, memory_path / "straight", asked)
    assert done.returncode == 0, done.stderr
    told = metrics(memory_path / "straight")[0]["environment"]
    assert told["BLAS"].endswith("COMPATIBLE") == has_mkl()
    assert told["processor"].endswith(torch.backends.cpu.get_cpu_capability())
    cut = train(model_folder, data_file, memory_path / "cut", asked)
    assert cut.returncode == 0
    for name in ("summary.json", "model/model.safetensors"):
        (memory_path / "cut" / name).unlink()
    (memory_path / "cut" / "model" / "config.json").rename(memory_path / "config.json")
    done = train(model_folder, data_file, memory_path / "cut", asked, "--resume")
    assert "going on after step 5" in done.stderr, done.stderr
    a, b = weights(memory_path / "straight"), weights(memory_path / "cut")
    assert all(torch.equal(a[name], b[name]) for name in a)


@with_mkl
@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("gcc") is None, reason="no gcc, or no Linux")
@pytest.mark.parametrize(("mode", "even"), [("", False), ("COMPATIBLE", True)])
def test_as_on_a_processor_of_another_maker(tmp_path, mode, even):
    """Where products do depend on the alignment, the mode ends it; so the tests of bits run in it."""
    shim = tmp_path / "not_intel.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", shim, CHECKOUT / "benchmarks" / "not_intel.c"], check=True)
    code = "from lisatune.run.determinism import *; print([str(product) for product in uneven_products()])"
    done = python("-c", code, LD_PRELOAD=str(shim), MKL_CBWR=mode)
    assert done.returncode == 0, done.stderr
    assert (done.stdout.strip() == "[]") == even
    if not even:
        assert "(8, 8) by rows x (8, 8) by columns" in done.stdout  # queries and keys of a small attention


LATE = """
import torch
from lisatune import UserError
from lisatune.run.determinism import be_deterministic, mkl_mode
if {multiplied}:
    torch.ones(2, 2) @ torch.ones(2, 2)
be_deterministic(torch.device("cpu"))
print(mkl_mode())
"""


@with_mkl
def test_in_a_process_that_has_multiplied_already_it_is_refused():
    refused = python("-c", LATE.format(multiplied=True))
    assert (
        "UserError: full_determinism=true comes too late, because this process has already multiplied matrices"
        in refused.stderr
    )
    assert "set MKL_CBWR=COMPATIBLE in the environment before Python starts" in refused.stderr
    for multiplied, environment in ((False, {}), (True, {"MKL_CBWR": "COMPATIBLE"})):
        done = python("-c", LATE.format(multiplied=multiplied), **environment)
        assert done.stdout.strip() in ("COMPATIBLE", "None"), done.stderr


@pytest.fixture
def elsewhere(monkeypatch):
    """A run that is resumed on another processor, as far as it can see."""
    import lisatune.run.resume as module

    here = module.environment

    def move():
        monkeypatch.setattr(module, "environment", lambda device: here(device) | {"processor": "Another, AVX2"})

    return move


@pytest.fixture
def _as_before():
    yield
    torch.use_deterministic_algorithms(False)


def test_another_processor_is_told_of(model_folder, data_file, tmp_path, elsewhere):
    run(model_folder, data_file, tmp_path / "run", 3)
    elsewhere()
    _, said = run(model_folder, data_file, tmp_path / "run", resume=True)
    assert "now it is Another, AVX2: bit-identical weights need the same" in said


@pytest.mark.usefixtures("_as_before")
def test_another_processor_is_refused_where_equal_bits_were_asked_for(model_folder, data_file, tmp_path, elsewhere):
    run(model_folder, data_file, tmp_path / "run", 3, full_determinism=True)
    elsewhere()
    with pytest.raises(UserError, match="began differently: processor was .*, now it is Another, AVX2"):
        run(model_folder, data_file, tmp_path / "run", resume=True, full_determinism=True)
    _, said = run(model_folder, data_file, tmp_path / "run", resume=True, full_determinism=True, allow_changes=True)
    assert "now it is Another, AVX2" in said
