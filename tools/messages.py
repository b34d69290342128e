"""Every message of lisatune on one page, to read as somebody who does not know the code: errors, refusals, warnings, notes.

Usage: python tools/messages.py [--long] [--kind KIND]

It reads the source, so a value stands as {its expression}. A sentence ends at a full stop, a question mark, a semicolon or
the end of the message: a message gives its remedy after a colon, and a second one after a semicolon.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "lisatune"
KIND_OF = {
    "UserError": "error", "BadRowError": "error", "MissingPackageError": "error", "missing_package": "error",
    "Damaged": "error", "RequestRefused": "error", "BudgetSpent": "error", "_Again": "error", "_error": "error",
    "ValueError": "error", "TypeError": "error", "RuntimeError": "error", "Stopped": "note", "warn": "warning", "tell": "note",
}  # fmt: skip
COLUMNS_WITH_TEXT = ("only_with", "needs", "never_with", "idle_with", "gpu")  # of a setting's row
FEWEST_WORDS = 3  # fewer are a part of a message
MOST_WORDS = 20
SENTENCE_END = re.compile(r"(?<=[.?;])\s+")


@dataclass(frozen=True)
class Message:
    """A text that a user may read, and where it stands."""

    file: str
    line: int
    kind: str
    text: str

    def sentence_lengths(self) -> list[int]:
        """Words of each sentence; a value counts as one.

        Example:
            >>> Message("a.py", 1, "error", "{path.name(0)} is gone; choose another").sentence_lengths()
            [3, 2]
        """
        plain = re.sub(r"\{[^{}]*\}", "value", self.text)
        return [len(re.findall(r"\S*\w\S*", sentence)) for sentence in SENTENCE_END.split(plain)]


def text_of(node: ast.expr) -> str:
    """What an expression writes, with values as {their expression}; of two texts to choose from, both.

    Example:
        >>> text_of(ast.parse("f'{name} is ' + ('on' if x else 'off')", mode="eval").body)
        '{name} is (on | off)'
    """
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(text_of, parts))
        case ast.FormattedValue(value=ast.Constant() | ast.IfExp() | ast.JoinedStr() as inner):
            return text_of(inner)
        case ast.FormattedValue(value=inner):
            return "{" + ast.unparse(inner).replace("{", "(").replace("}", ")") + "}"
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return text_of(left) + text_of(right)
        case ast.IfExp(body=one, orelse=other):
            return f"({text_of(one)} | {text_of(other)})"
        case _:
            return "{" + ast.unparse(node).replace("{", "(").replace("}", ")") + "}"


def messages(path: Path) -> Iterator[Message]:
    """The messages of a file."""
    file = str(path.relative_to(ROOT))
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # texts that several settings share: a dictionary with a name, from conditions to refusals
    conditions = [node.value for node in tree.body if isinstance(node, ast.Assign) and "settings" in path.parts]
    for node in ast.walk(tree):
        texts: list[tuple[str, ast.expr]] = []
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in KIND_OF and node.args:
                # of `warn(console, text)` and `tell(console, text)` the second
                number = 1 if name in ("warn", "tell") and ast.unparse(node.args[0]).endswith("onsole") else 0
                texts = [(KIND_OF[name], argument) for argument in node.args[number : number + 1]]
            elif name == "row":
                columns = [word.value for word in node.keywords if word.arg in COLUMNS_WITH_TEXT]
                inside = [value for column in columns for value in getattr(column, "values", [column])]
                texts = [("refusal", value) for value in inside]
        elif isinstance(node, ast.Yield | ast.Return) and "settings" in path.parts and node.value is not None:
            texts = [("refusal", node.value)]
        elif isinstance(node, ast.Dict) and node in conditions:
            texts = [("refusal", value) for value in node.values]
        for kind, node_of_text in texts:
            text = text_of(node_of_text)
            if len(re.findall("[a-z]+", re.sub(r"\{[^{}]*\}", "", text))) >= FEWEST_WORDS:
                yield Message(file, node_of_text.lineno, kind, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=sorted({*KIND_OF.values(), "refusal"}), help="only these")
    parser.add_argument("--long", action="store_true", help=f"only those with a sentence over {MOST_WORDS} words")
    options = parser.parse_args()
    found = [message for path in sorted(SOURCE.rglob("*.py")) for message in messages(path)]
    found = sorted((one for one in found if options.kind in (None, one.kind)), key=lambda one: (one.file, one.line))
    for message in found:
        if not options.long or max(message.sentence_lengths()) > MOST_WORDS:
            print(f"{message.file}:{message.line}: {message.kind}: {message.text}")
    lengths = [length for message in found for length in message.sentence_lengths()]
    over = 100 * sum(length > MOST_WORDS for length in lengths) / len(lengths)
    print(
        f"\n{len(found)} messages, {sum(lengths) / len(lengths):.1f} words a sentence, {over:.0f}% over {MOST_WORDS}, "
        f"the longest {max(lengths)}"
    )


if __name__ == "__main__":
    main()
