"""README and docs as a test reads them: their commands, and what they name that does not exist."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import typer

from lisatune.cli.app import COMMANDS, TAKES_SETTINGS, app
from lisatune.settings import TrainConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OF_COMPARE = ("methods", "search", "trials")  # words of a grid that are no settings of a run
OTHERS = ("key", "use_cache")  # other words with an equals sign: an example of the form, an argument of transformers


PROGRAMS = ("lisatune", "python", "torchrun", "accelerate", "srun", "pip", "make", "cp", "ls", ".")
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")


@dataclass(frozen=True)
class Block:
    """A block of code of a page.

    Attributes:
        line: Number of its first line in the page, from 1.
        language: What stands after the backticks; empty for an indented block.
        lines: Its lines, joined where one goes on after a backslash, without comments.
        why_not_run: The reason in the comment ``<!-- not run: REASON -->`` above it; empty if there is none.
    """

    line: int
    language: str
    lines: tuple[str, ...]
    why_not_run: str

    @property
    def is_run(self):
        """Whether a reader would run it: it has a command or is Python, and it has no reason not to be run."""
        runnable = self.language in ("python", "diff") or any(line.split()[:1][0] in PROGRAMS for line in self.lines)
        return runnable and not self.why_not_run


def blocks(text):
    """The blocks of code of a page, indented and fenced."""
    found, lines = [], text.splitlines()
    number, reason = 0, ""
    while number < len(lines):
        line = lines[number]
        fenced = line.startswith("```")
        if fenced or line.startswith("    "):
            start = number + 1 if fenced else number
            end = start
            while end < len(lines) and not (lines[end].startswith("```") if fenced else lines[end][:4].strip()):
                end += 1
            code = "\n".join(line if fenced else line[4:] for line in lines[start:end]).replace("\\\n", " ")
            plain = (
                code.splitlines()
                if line[3:] == "python"
                else [re.sub(r"(^|\s)# .*", "", one) for one in code.splitlines()]
            )
            found.append(
                Block(start + 1, line[3:] if fenced else "", tuple(one for one in plain if one.strip()), reason)
            )
            number, reason = end + fenced, ""
            continue
        if line.strip():
            match = NOT_RUN.fullmatch(line)
            reason = match[1] if match else ""
        number += 1
    return found


def code_lines(text):
    return [line.strip() for block in blocks(text) for line in block.lines]


def commands(text):
    """Words after `lisatune` of every command in code blocks, without what follows `--`: another program takes that."""
    lines = [line.partition("-m lisatune ")[2] or line.removeprefix("lisatune ") for line in code_lines(text)
             if line.startswith("lisatune ") or "-m lisatune " in line]  # fmt: skip
    split = [shlex.split(line) for line in lines]
    own = [words[: words.index("--")] if "--" in words else words for words in split]
    return [[word for word in words if word != "..."] for words in own]


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them, and of objects that mkdocstrings describes."""
    text = path.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return set(re.findall(r"^::: (.+)$", text, re.MULTILINE)) | {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings
    }


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
    in_commands = [word for words in commands(text) if words[0] in TAKES_SETTINGS for word in words]
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
