"""`lisatune env`: what an issue report needs."""

import json
import platform
import sys
from importlib import metadata

import torch

from lisatune.cli import env
from typed import typed


def test_versions_and_extras_as_text_and_as_json():
    found = json.loads(typed("env", "--json").stdout)
    assert found["python"].endswith(platform.python_version())
    assert found["packages"]["torch"] == metadata.version("torch") == torch.__version__
    assert found["packages"].keys() >= {"transformers", "safetensors", "peft", "datasets", "trl"}
    assert found["missing_of_extras"].keys() >= {"always needed", "lora", "data"}
    assert "dev" not in found["missing_of_extras"]
    assert found["missing_of_extras"]["always needed"] == []
    told = typed("env")
    assert told.returncode == 0
    assert f"  torch: {torch.__version__}\n" in told.stdout
    assert f"  BLAS: {found['torch']['BLAS']}\n" in told.stdout


def test_an_extra_is_missing_if_its_package_is_absent_or_too_old(monkeypatch):
    monkeypatch.setattr(env, "version_of", {"datasets": "4.9"}.get)
    assert env.missing_of_extras()["data"] == ["datasets>=5"]
    assert env.missing_of_extras()["lora"] == ["peft>=0.21"]
    monkeypatch.setattr(env, "version_of", {"datasets": "5.1", "peft": "0.22.0.dev0"}.get)
    assert env.missing_of_extras()["data"] == env.missing_of_extras()["lora"] == []


def test_a_torch_that_cannot_be_imported_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "cannot be imported" in env.described_torch()["error"]


def test_passwords_in_the_environment_are_not_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    told = typed("env").stdout
    assert "OMP_NUM_THREADS: 3" in told
    assert "hf_secret" not in told


def test_run_from_source_without_being_installed(monkeypatch):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert env.described()["packages"] == {}


def test_what_another_system_needs_is_not_missing_here(monkeypatch):
    texts = [
        "torch>=2",
        "nothing-of-this-name>=1; sys_platform == 'plan9'",
        "peft; extra == 'lora'",
        "ruff; extra == 'dev'",
    ]
    monkeypatch.setattr(env.metadata, "requires", lambda package: texts)
    assert [(extra, need.name) for extra, need in env.needs()] == [("", "torch"), ("lora", "peft")]
