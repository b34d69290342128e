"""How long the sentences of README and docs are.

Usage: python tools/sentences.py [--at COMMIT] [PAGE ...]

Counts words in running text: paragraphs, list items and table cells of three words or more. Code blocks, tables' rules and
addresses of links are left out. A sentence ends at a full stop, a question mark, or the end of its paragraph, item or cell.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
ITEM = re.compile(r"^\s*(?:[-*]|\d+\.) ")
SENTENCE_END = re.compile(r"(?<=[.!?])[*)\"]*\s+(?=[^a-z\s])")
FEWEST_WORDS = 3  # fewer are a label, no sentence


def blocks(text: str) -> list[str]:
    """Paragraphs, list items and table cells of a page, without code blocks and headings.

    Example:
        >>> blocks("# Title\\n\\nOne two\\nthree.\\n\\n    code\\n\\n- an item\\n- another\\n| a cell | b |\\n")
        ['One two three.', 'an item', 'another', 'a cell', 'b']
    """
    found: list[str] = []
    fenced = open_paragraph = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        code = fenced or line.startswith("```") or (line.startswith("    ") and not open_paragraph)
        if code or not line.strip() or line.startswith("#"):
            open_paragraph = False
        elif line.startswith("|"):
            found += [cell.strip() for cell in line.strip("|").split("|") if cell.strip(" -:")]
            open_paragraph = False
        elif open_paragraph and not ITEM.match(line):
            found[-1] += " " + line.strip()
        else:
            found.append(ITEM.sub("", line, count=1).strip())
            open_paragraph = True
    return found


def sentence_lengths(text: str) -> list[int]:
    """Words of each sentence of a page.

    Example:
        >>> sentence_lengths("It trains a part. The [rest](a.md) is frozen then.")
        [4, 5]
    """
    counts = [
        len(re.findall(r"\S*\w\S*", sentence))
        for block in blocks(text)
        for sentence in SENTENCE_END.split(LINK.sub(r"\1", block))
    ]
    return [count for count in counts if count >= FEWEST_WORDS]


def pages(commit: str | None) -> dict[str, str]:
    """README and docs by their path, as they are now or were at a commit; the page of settings is made from the code."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout

    if commit is None:
        paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
        found = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}
    else:
        names = git("ls-tree", "--name-only", commit, "README.md", "docs/").split()
        found = {name: git("show", f"{commit}:{name}") for name in names if name.endswith(".md")}
    return {name: text for name, text in found.items() if name != "docs/settings.md"}


def row(name: str, lengths: list[int]) -> str:
    """A line of the table; lengths are words."""
    over = [100 * sum(length > limit for length in lengths) / len(lengths) for limit in (20, 30)]
    return f"{name:<28} {len(lengths):>9} {sum(lengths) / len(lengths):>14.1f} {over[0]:>8.0f}% {over[1]:>8.0f}% {max(lengths):>8}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="for example docs/memory.md; default: README and docs")
    parser.add_argument("--at", metavar="COMMIT", help="the pages as they were at this commit")
    options = parser.parse_args()
    lengths = {
        name: sentence_lengths(text)
        for name, text in pages(options.at).items()
        if not options.pages or name in options.pages
    }
    print(f"{'page':<28} {'sentences':>9} {'words/sentence':>14} {'over 20':>9} {'over 30':>9} {'longest':>8}")
    for name, of_page in lengths.items():
        print(row(name, of_page))
    print(row("all", [length for of_page in lengths.values() for length in of_page]))


if __name__ == "__main__":
    main()
