"""docs/install.md and the Dockerfile, as far as they can be checked without Docker: what they name exists, and is spelled alike."""

import fnmatch
import re
import shlex
import shutil
import subprocess
import tomllib

import pytest

from doc_pages import PAGES, blocks, faults
from places import CHECKOUT

pytestmark = pytest.mark.quick
PAGE = CHECKOUT / "docs" / "install.md"
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
KNOWN = ("FROM", "ARG", "RUN", "COPY", "ENV", "WORKDIR", "USER", "ENTRYPOINT")


def instructions():
    """Each instruction of the Dockerfile with its text, where lines that end with a backslash are one."""
    lines = [line for line in (CHECKOUT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(" ", 1)) for line in whole.splitlines() if line.strip()]


def texts(name):
    return [text for word, text in instructions() if word == name]


def commands_of_page(program):
    found = [shlex.split(line) for block in blocks(PAGE.read_text()) for line in block.lines]
    return [words for words in found if words[0] == program]


def is_sent(path):
    """Whether Docker's builder is given ``path``: by the last line of .dockerignore that is about it."""
    sent = True
    for line in (CHECKOUT / ".dockerignore").read_text().split():
        pattern = line.removeprefix("!")
        if any(fnmatch.fnmatch(part, pattern) for part in (path, path.split("/")[0])):
            sent = line.startswith("!")
    return sent


def test_the_image_is_made_of_instructions_and_files_that_exist():
    assert {word for word, _ in instructions()} <= set(KNOWN)
    copied = [path for text in texts("COPY") for path in text.split()[:-1]]
    assert [path for path in copied if not (CHECKOUT / path).exists() or not is_sent(path)] == []
    built = {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "src"}
    assert built <= set(copied), "what the wheel is built of"
    assert not is_sent(".venv")


def test_the_image_has_a_python_that_will_do_and_starts_the_command():
    (image,) = texts("FROM")
    least = PROJECT["requires-python"].removeprefix(">=")
    version = re.fullmatch(r"python:(\d+\.\d+)-slim", image)[1]
    assert [*map(int, version.split("."))] >= [*map(int, least.split("."))]
    assert texts("ENTRYPOINT") == [f'["{name}"]' for name in PROJECT["scripts"]]


def test_the_image_is_built_by_commands_that_a_shell_can_read():
    shell = shutil.which("sh") or pytest.skip("there is no sh")
    for text in texts("RUN"):
        told = subprocess.run([shell, "-n", "-c", text], capture_output=True, text=True)
        assert (told.returncode, told.stderr) == (0, ""), text


def test_docker_is_called_with_arguments_that_the_image_has():
    given = dict(text.split("=") for text in texts("ARG"))
    assert set(given["EXTRAS"].split(",")) <= set(EXTRAS)
    words = [word for words in commands_of_page("docker") if words[1] == "build" for word in words]
    words += re.findall(r"--build-arg \S+", PAGE.read_text())
    named = {match[1]: match[2] for word in words if (match := re.search(r"\b([A-Z]+)=([\w,]+)", word))}
    assert set(named) == set(given), "each argument is on the page, and no other"
    assert set(named["EXTRAS"].split(",")) <= set(EXTRAS)


def test_what_docker_runs_are_commands_of_lisatune(tmp_path):
    runs = [words for words in commands_of_page("docker") if words[1] == "run"]
    assert {words[-1] for words in runs} == {"runs/a", "0.0.0.0"}
    page = tmp_path / "page.md"
    page.write_text("\n".join("    " + shlex.join(words[words.index("lisatune") :]) for words in runs))
    assert faults(page) == []


def test_the_table_has_every_extra_with_its_packages():
    rows = re.findall(r"^\| `(\w+)` \| .+ \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    assert {name: re.findall(r"`([^`]+)`", cell) for name, cell in rows if name != "dev"} == {
        name: needs for name, needs in EXTRAS.items() if name != "dev"
    }


def test_extras_that_are_named_anywhere_exist():
    places = [*PAGES, *(CHECKOUT / "src").rglob("*.py"), CHECKOUT / "Makefile"]
    named = {
        extra
        for path in places
        for words in re.findall(
            r"(?:lisatune|'\.|\"\.|\.whl)\\*\[([a-z_]+(?:,[a-z_]+)*)\]", path.read_text(encoding="utf-8")
        )
        for extra in words.split(",")
    }
    assert {"lora", "data", "report", "dev", "wandb"} <= named, "they are found"
    assert named <= set(EXTRAS)
