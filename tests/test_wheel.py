"""What `pip install` gives: wheel and sdist built, the wheel installed in an environment of its own, and used there."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from places import CHECKOUT
from tiny import write_rows

pytestmark = pytest.mark.slow


def build(source, folder):
    """The wheel and the sdist of the project at ``source``."""
    pytest.importorskip("hatchling", reason="hatchling builds the wheel: pip install hatchling")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", folder], cwd=source, check=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(CHECKOUT, tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def lisatune(built, tmp_path_factory):
    """The command of the installed wheel. It sees the packages of this environment, but not this checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"), folder / "Lib" / "site-packages")
    pytest.importorskip("pip", reason="pip installs the wheel")
    pip = [sys.executable, "-m", "pip", "--python", folder, "--disable-pip-version-check", "install"]
    subprocess.run([*pip, "--quiet", "--no-deps", "--no-index", built[0]], check=True)
    others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "others.pth").write_text("\n".join(others))
    command = next(path for path in [folder / "bin/lisatune", folder / "Scripts/lisatune.exe"] if path.exists())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words, cwd):
        return subprocess.run(
            [command, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8"
        )

    run.site = site
    return run


def test_the_wheel_has_all_files_of_the_package(built):
    source = CHECKOUT / "src"
    files = {
        path.relative_to(source).as_posix()
        for path in (source / "lisatune").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert names(built[0]) == files
    assert files >= {
        "lisatune/py.typed", "lisatune/recipes/instructions.yaml", "lisatune/demo/train.jsonl",
        "lisatune/demo/held_out.jsonl", "lisatune/watch/watch.js", "lisatune/watch/watch.css",
    }  # fmt: skip


def test_the_sdist_builds_the_same_wheel(built, tmp_path):
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert names(build(source, tmp_path / "again")[0]) == names(built[0])


def test_from_a_recipe_to_a_chat(lisatune, model_folder, tmp_path):
    done = lisatune("env", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "lisatune" in done.stdout
    assert lisatune("init", "instructions", cwd=tmp_path).returncode == 0
    write_rows(tmp_path / "rows.jsonl")
    done = lisatune(
        "train", "--config", "instructions.yaml", "--model", model_folder, "--data", "rows.jsonl", "--output", "run",
        "eval_rows=4", "max_steps=2", "warmup_steps=0", "max_length=64", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/model/model.safetensors").exists()
    done = lisatune("chat", "run", "--prompt", "What is 1 plus 1?", "--max-new-tokens", 4, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_code_that_runs_is_the_wheels(lisatune, tmp_path):
    python = next(path for path in (lisatune.site.parents[2] / "bin").glob("python"))
    words = [python, "-c", "import lisatune; print(lisatune.__file__)"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(lisatune.site)
