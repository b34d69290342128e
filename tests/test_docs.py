"""README and docs: their links lead somewhere, and the commands, options and settings that they name exist.

The settings of each `lisatune train` go through the same check as a run's. test_docs_commands.py runs the commands.
"""

import re

import pytest

import lisatune
from doc_pages import PAGES, ROOT, commands, faults
from lisatune.settings import build_config
from lisatune.settings.files import read_settings

pytestmark = pytest.mark.quick


def id_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PAGES, ids=id_of)
def test_all_that_a_page_names_exists(path):
    assert faults(path) == []


def test_each_fault_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading\n\n[a](gone.md) [b](#gone) [c](#a-heading) `lisatune trane` `num_activ=2` `num_active=2`\n\n"
        "    lisatune train --modell M \\\n        learning_rat=1 seed=0    # a comment=1\n"
    )
    assert faults(page) == [
        "no file gone.md", "no heading #gone", "no command trane", "no option --modell of train",
        "no setting learning_rat in learning_rat=1", "no setting num_activ in num_activ=2",
    ]  # fmt: skip


@pytest.mark.parametrize("path", PAGES, ids=id_of)
def test_no_command_of_a_page_would_be_refused(path):
    for words in commands(path.read_text(encoding="utf-8")):
        if words[0] == "train":
            settings = read_settings(None, [word for word in words[1:] if "=" in word and not word.startswith("-")])
            build_config({"model": "m", "data": "d", "output": "o", **settings})


@pytest.mark.parametrize("path", [path for path in PAGES if path.name != "settings.md"], ids=id_of)
def test_no_cell_of_a_table_is_long(path):
    rows = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [re.sub(r"\]\([^)]*\)", "]", cell).strip() for line in rows for cell in line.split(" | ")]
    assert [cell for cell in cells if len(cell) > 120 and path.parent.name == "docs"] == []


def test_the_api_page_has_every_public_object_once():
    listed = re.findall(r"^::: lisatune\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(lisatune.__all__)
