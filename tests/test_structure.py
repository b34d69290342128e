"""The floor plan of the package, as tools/structure.py counts it."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def structure():
    spec = importlib.util.spec_from_file_location("structure", ROOT / "tools" / "structure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_package_keeps_to_its_floor_plan(structure):
    assert structure.faults(ROOT) == []


def test_each_fault_is_found(structure, tmp_path):
    package = tmp_path / "src" / "lisatune"
    for name in ("settings", "upper", "lower"):
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").write_text("")
    for number in range(13):
        (package / f"file_{number}.py").write_text("")
    (package / "file_1.py").write_text("from lisatune.file_2 import a\n")
    (package / "file_2.py").write_text("def f():\n    import lisatune.file_1\n")
    (package / "upper" / "a.py").write_text("from lisatune.lower.b import x\n")
    (package / "lower" / "b.py").write_text("x = 0\n")
    (package / "lower" / "c.py").write_text("from lisatune.upper import a\n")
    (package / "upper" / "long.py").write_text('def f():\n    """Text."""\n' + "    x = 0\n" * 61)
    (package / "settings" / "some.py").write_text("x = 0\n" * 201)
    assert structure.faults(tmp_path) == [
        "13 files at the top of the package, at most 12",
        "files import one another: lisatune.file_1, lisatune.file_2",
        "rooms import one another: file_1, file_2",
        "rooms import one another: lower, upper",
        "lisatune.upper.long.f has a body of 61 lines, at most 60",
        "lisatune.settings.some has 201 lines, at most 200",
    ]


def test_imports_for_types_alone_close_no_circle(structure, tmp_path):
    package = tmp_path / "src" / "lisatune"
    package.mkdir(parents=True)
    (package / "a.py").write_text("import lisatune.b\n")
    (package / "b.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lisatune.a\n")
    (package / "settings").mkdir()
    (package / "settings" / "config.py").write_text("class TrainConfig:\n    seed: int = 0\n")
    assert structure.faults(tmp_path) == []
