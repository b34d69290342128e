"""The help of each command: it can be read without knowing the tool, and its examples would not be refused."""

import inspect
from importlib import metadata

import pytest
import typer

from doc_pages import commands, faults
from lisatune.cli.app import COMMANDS, app
from typed import typed

pytestmark = pytest.mark.quick
MAX_WORDS = 20
COLUMNS = 80


def help_of(name):
    return inspect.cleandoc(COMMANDS[name].__doc__)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_begins_with_a_sentence_that_stands_alone(name):
    first = help_of(name).partition("\n")[0]
    assert first[0].isupper()
    assert first.endswith(".")
    assert len(first.split()) <= MAX_WORDS


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_that_would_not_be_refused(name, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(help_of(name))
    assert name in [words[0] for words in commands(page.read_text())], "its docstring has no example"
    assert faults(page) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_prints_its_text_as_it_is_written(name):
    prose, _, example = help_of(name).partition("Example:\n")
    shown = typed(name, "--help", columns=COLUMNS).stdout
    assert " ".join(prose.replace("\\[", "[").split()) in " ".join(shown.split()), "a word is taken for markup"
    assert [line for line in example.splitlines() if line not in shown] == [], "a line is too long for a terminal"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_stands_under_a_heading(name):
    command = typer.main.get_command(app).commands[name]
    options = command.get_params(typer.Context(command))
    bare = [option.name for option in options if option.param_type_name == "option" and not option.rich_help_panel]
    assert bare == [], "give them rich_help_panel; cli/common.py has the headings that commands share"


def test_the_shell_completes_commands(monkeypatch):
    monkeypatch.setenv("_LISATUNE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "lisatune sc")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert typed().stdout.split() == ["score-layers"]


def test_the_version_is_printed():
    assert typed("--version").stdout == f"lisatune {metadata.version('lisatune')}\n"


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["plan", "--model", "m", "--data", "d"], "plan reads no data and writes nothing: leave out --data"),
        (["eval", "runs/a"], "tasks are missing: give --tasks, for example --tasks gsm8k,mmlu"),
    ],
)
def test_what_a_newcomer_types_is_answered_with_the_remedy(words, remedy):
    done = typed(*words)
    assert done.returncode == 2
    assert done.stderr.startswith(f"lisatune: {remedy}")
