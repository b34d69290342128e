"""README and docs: their links lead somewhere, and the commands, options and settings that they name exist.

Commands of the docs are checked here, not run: most need a model from the hub, a GPU, several hosts or a judge's key. The
settings of each `lisatune train` go through the same check as a run's. Tests of tests/cli, tests/run and tests/processes run
the commands themselves on small models, and `make test-slow` runs the demo.
"""

import re
import shlex
from pathlib import Path

import pytest
import typer

from lisatune.cli.app import COMMANDS, app
from lisatune.settings import TrainConfig, build_config
from lisatune.settings.files import read_settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TAKE_SETTINGS = ("train", "data", "plan", "compare")
OF_COMPARE = ("methods", "search")  # words of a grid that are no settings of a run
OTHERS = ("key", "use_cache")  # other words with an equals sign: an example of the form, an argument of transformers
pytestmark = pytest.mark.quick


def id_of(path):
    return str(path.relative_to(ROOT))


def code_lines(text):
    """Lines of code blocks, joined where one goes on after a backslash, without comments."""
    lines, fenced = [], False
    for line in text.replace("\\\n", " ").splitlines():
        fenced ^= line.startswith("```")
        if fenced or line.startswith("    "):
            lines.append(re.sub(r"\s#\s.*", "", line).strip())
    return lines


def commands(text):
    """Words after `lisatune` of every command in code blocks."""
    lines = [line.partition("-m lisatune ")[2] or line.removeprefix("lisatune ") for line in code_lines(text)
             if line.startswith("lisatune ") or "-m lisatune " in line]  # fmt: skip
    return [[word for word in shlex.split(line) if word != "..."] for line in lines]


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def options_of(command):
    return {name for param in typer.main.get_command(app).commands[command].params for name in param.opts}


def faults(path):
    """What a page names and what does not exist."""
    text = path.read_text(encoding="utf-8")
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        if re.match(r"https?:", target):
            continue
        if not there.exists():
            found.append(f"no file {target}")
        elif anchor and anchor not in anchors(there):
            found.append(f"no heading {target}")
    for command in re.findall(r"`lisatune ([a-z-]+)", text) + [words[0] for words in commands(text)]:
        if command not in COMMANDS and not command.startswith("-"):
            found.append(f"no command {command}")
    for words in commands(text):
        if words[0] in COMMANDS:
            given = {word.partition("=")[0] for word in words[1:] if word.startswith("--")}
            found += [f"no option {name} of {words[0]}" for name in sorted(given - options_of(words[0]))]
    # settings: key=value in the commands that take them, and in code spans of the text
    in_commands = [word for words in commands(text) if words[0] in TAKE_SETTINGS for word in words]
    spans = [word for span in re.findall(r"`([^`\n]+)`", text) for word in span.split() if "(" not in span]
    for word in in_commands + spans:
        if (match := re.fullmatch(r"(?:\w+\.)?([a-z]\w*)=[^=].*", word)) and path.name not in (
            "trainer.md",
            "CONTRIBUTING.md",
        ):
            name = match[1]
            if name not in TrainConfig.model_fields and name not in OF_COMPARE and name not in OTHERS:
                found.append(f"no setting {name} in {word}")
    return found


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
