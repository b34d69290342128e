"""An inspection of data, for the terminal and as a page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from lisatune.common.files import write_whole
from lisatune.data.inspection import Inspection, ShownRow, histogram
from lisatune.pages.html import html_page, html_table

BAR = 40  # letters of the longest bar
LEARNED, CONTEXT = "bold green", "dim"
SPECIAL = (" magenta", " underline")  # a special token in the context, and a learned one
MARKS = "⟦⟧"  # around what is learned, where there are no colours
MOST_LETTERS = 1500  # letters of a row in the terminal

STYLE = """<style>
:root { --learned: #1a7f37; --over: #cf222e; --special: #8250df }
@media (prefers-color-scheme: dark) { :root { --learned: #4ac26b; --over: #ff7b72; --special: #d2a8ff } }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .7rem; padding: 0; list-style: none }
.tiles li { border: 1px solid #8884; border-radius: .5rem; padding: .5rem .8rem; font-size: .85rem; line-height: 1.3 }
.tiles b { display: block; font-size: 1.45rem; line-height: 1.4; font-variant-numeric: tabular-nums }
.lengths { display: grid; grid-template-columns: max-content 1fr; gap: 3px .8rem; align-items: center; font-size: .9rem;
  font-variant-numeric: tabular-nums }
.lengths .range { text-align: right }
.lengths .bar { display: inline-block; height: .85em; margin-right: .5em; vertical-align: -.05em; border-radius: 2px;
  background: var(--learned) }
.lengths .over { background: var(--over) }
.lengths .limit { grid-column: 1 / -1; border-top: 2px dashed var(--over); color: var(--over); font-size: .85rem }
.row { margin: 1.4rem 0 } .row pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 0; line-height: 1.5 }
.where { display: flex; justify-content: space-between; gap: 1rem; font-size: .85rem }
.learned { background: #2da44e33; box-shadow: 0 2px var(--learned); border-radius: 2px }
.special { color: var(--special) }
.ids { font-size: .8rem; overflow-wrap: anywhere }
</style>"""


def show(found: Inspection, *, ids: bool = False, marks: bool = False) -> RenderableType:
    """The inspection for a terminal: files, rows, lengths, and a few rows with what is learned in green.

    Args:
        found: What to show.
        ids: Show the tokens of each row.
        marks: Put what is learned between brackets too, for a terminal without colours.
    """
    parts: list[RenderableType] = [Rule(", ".join(found.names), style="cyan")]
    parts += [_files(found), _rows(found), _lengths(found)]
    learned = "learned".join(MARKS) if marks else "learned"
    legend = Text.assemble((learned, LEARNED), (" and ", ""), ("context", CONTEXT), (f", {len(found.rows)} rows", ""))
    parts += [Rule(legend, style="cyan"), *(_panel(row, found.special, ids=ids, marks=marks) for row in found.rows)]
    return Group(*parts)


def _files(found: Inspection) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("file", "rows", "split", ""):
        table.add_column(name, justify="right" if name == "rows" else "left", header_style="cyan", overflow="fold")
    for name, rows, split, told in _file_cells(found):
        left_out = told.startswith("left out")
        table.add_row(
            Text(name), rows, Text(split), Text(told, "" if left_out else "green"), style="dim" if left_out else None
        )
    return Padding(table, (0, 0, 1, 0))


def _rows(found: Inspection) -> RenderableType:
    counts = found.counts
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for justify in ("right", "left"):
        table.add_column(justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.add_row(f"{counts.read:,}", "rows read")
    used = f", as {counts.documents:,} documents" if counts.documents != counts.used else ""
    table.add_row(f"{counts.used:,}", Text(f"used{used}", style="green"))
    for reason, number in counts.reasons.most_common():
        table.add_row(f"{number:,}", Text(f"refused: {reason}", style="red"))
    if counts.truncated:
        table.add_row(
            f"{counts.truncated:,}",
            Text(f"cut at max_length={found.max_length}: {counts.cut_tokens:,} tokens lost", "yellow"),
        )
    for name, number in counts.left_out.most_common():
        table.add_row(f"{number:,}", Text(f"have {name}, which is not used", style="yellow"))
    table.add_row(f"{counts.tokens:,}", "tokens")
    share = counts.labelled_tokens / max(1, counts.tokens)
    table.add_row(f"{counts.labelled_tokens:,}", Text(f"of them learned, {share:.0%}", style=LEARNED))
    bad = [Text(message, style="red") for message in counts.bad]
    return Padding(Group(table, *bad), (0, 0, 1, 0))


def _lengths(found: Inspection) -> RenderableType:
    bars = histogram(found.lengths, found.max_length)
    most = max((count for _, _, count in bars), default=0)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(justify="right")
    marked = False
    for first, last, count in bars:
        if first > found.max_length and not marked:
            table.add_row("", Text("─" * 12 + f" max_length={found.max_length} ", style="yellow"))
            marked = True
        bar = Text.assemble((_bar(count, most), "red" if marked else "green"), f" {count:,}" if count else "")
        table.add_row(f"{first:,}-{last:,}", bar)
    others = found.padding.told()
    notes = Text(
        f"padding {found.padding.plain:.0%} of the tokens computed at {found.batch_size} rows a batch"
        f"{f' ({others})' if others else ''}; longest row "
        f"{max(found.lengths, default=0):,} tokens, max_length {found.max_length:,}"
    )
    return Padding(Group(Text("tokens of a row", style="cyan"), table, notes), (0, 0, 1, 0))


def _bar(count: int, most: int) -> str:
    eighths = round(8 * BAR * count / most) if most else 0
    text = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]
    return text.strip() or ("▏" if count else "")


def _panel(row: ShownRow, special: Sequence[str], *, ids: bool, marks: bool) -> Panel:
    text, room = Text(), MOST_LETTERS
    for part, learned in row.pieces:
        shown = part if len(part) <= room else part[:room] + " ..."
        text.append(MARKS[0] * (marks and learned))
        for one, is_special in set_apart(shown, special):
            text.append(one, style=(LEARNED if learned else CONTEXT) + SPECIAL[learned] * is_special)
        text.append(MARKS[1] * (marks and learned))
        room -= len(shown)
        if room <= 0:
            break
    body: RenderableType = text
    if ids:
        numbers = Text()
        for token, label in zip(row.ids, row.labels, strict=True):
            numbers.append(f"{token} ", style=LEARNED if label != -100 else CONTEXT)
        body = Group(text, Text(), numbers)
    return Panel(
        body, title=Text(row.title), title_align="left", subtitle=_size(row), subtitle_align="right", border_style="dim"
    )


def _size(row: ShownRow) -> str:
    return f"{len(row.ids):,} tokens, {sum(label != -100 for label in row.labels):,} learned"


def set_apart(text: str, special: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """``text`` in parts, each with whether it is a special token.

    Example:
        >>> list(set_apart("<s>Hi</s>", ["</s>", "<s>"]))
        [('<s>', True), ('Hi', False), ('</s>', True)]
    """
    parts = re.split(f"({'|'.join(map(re.escape, special))})", text) if special else [text]
    return ((part, bool(number % 2)) for number, part in enumerate(parts) if part)


# -- as a page -------------------------------------------------------------------------------------------------------


def write_page(found: Inspection, path: Path, *, ids: bool = False) -> Path:
    """A page of its own with all that ``show`` shows, and every row whole; returns ``path``."""
    write_whole(path, html_page(", ".join(found.names), [STYLE, *_page(found, ids=ids)]))
    return path


def _page(found: Inspection, *, ids: bool) -> Iterator[str]:
    yield _tiles(found)
    counts = found.counts
    left_out = [[f"{number:,} rows", f"refused: {reason}"] for reason, number in counts.reasons.most_common()]
    left_out += [
        [f"{number:,} rows", f"have {name}, which is not used"] for name, number in counts.left_out.most_common()
    ]
    left_out += [["", message] for message in counts.bad]
    if left_out:
        yield "<h2>Not used</h2>" + html_table(["", ""], left_out)
    yield "<h2>Files</h2>" + html_table(["file", "rows", "split", ""], list(_file_cells(found)))
    yield "<h2>Tokens of a row</h2>" + _bars(found)
    yield f"<h2>{len(found.rows):,} rows</h2><p>What is learned is <span class=learned>marked</span>.</p>"
    yield from (_html_row(row, found.special, ids=ids) for row in found.rows)


def _tiles(found: Inspection) -> str:
    counts = found.counts
    others = found.padding.told()
    tiles = [
        (f"{counts.used:,}", f"of {counts.read:,} rows used"),
        (f"{counts.tokens:,}", "tokens"),
        (f"{counts.labelled_tokens / max(1, counts.tokens):.0%}", f"learned, {counts.labelled_tokens:,} tokens"),
        (f"{max(found.lengths, default=0):,}", f"tokens in the longest row, max_length is {found.max_length:,}"),
        (f"{counts.truncated:,}", f"rows cut, {counts.cut_tokens:,} tokens lost"),
        (f"{found.padding.plain:.0%}", f"padding; {others}" if others else "padding"),
    ]
    tiles += [(f"{held.used:,}", f"rows held out {name}".rstrip()) for name, _, held in found.held_out]
    return (
        f"<ul class=tiles>{''.join(f'<li><b>{escape(number)}</b>{escape(told)}</li>' for number, told in tiles)}</ul>"
    )


def _file_cells(found: Inspection) -> Iterator[list[str]]:
    """What is read and what is not, a line each."""
    folders = [path for name in found.names if (path := Path(name).expanduser()).is_dir()]
    for file in found.read:
        yield [_short(file.path, folders), f"{file.num_rows:,}", file.split or "", file.note or "read"]
    for file, rows in found.left_out:
        told = "" if rows is None else f"{rows:,}"
        yield [_short(file.path, folders), told, file.split or "", f"left out: {file.left_out}"]
    for name, held, counts in found.held_out:
        told = f"held out {name}".rstrip()
        files = [file for file in held.source.told if file not in found.read]
        yield from ([_short(file.path, folders), f"{file.num_rows:,}", file.split or "", told] for file in files)
        if not files:
            yield [held.name, f"{counts.used:,}", "", told]


def _short(path: Path, folders: Sequence[Path]) -> str:
    """A file's path below the data's folder; its name elsewhere."""
    below = (
        path.relative_to(folder).as_posix() for folder in folders if path != folder and path.is_relative_to(folder)
    )
    return next(below, path.name)


def _bars(found: Inspection) -> str:
    bars = histogram(found.lengths, found.max_length)
    most = max((count for _, _, count in bars), default=0) or 1
    lines, limit = [], f"<span class=limit>max_length {found.max_length:,}</span>"
    for first, last, count in bars:
        over = first > found.max_length
        if over and limit:
            lines.append(limit)
            limit = ""
        lines.append(
            f"<span class=range>{first:,}-{last:,}</span>"
            f"<span><span class='bar{' over' * over}' style='width:{80 * count / most:.2f}%'></span>{f'{count:,}' if count else ''}</span>"
        )
    return f"<div class=lengths>{''.join(lines)}</div>"


def _html_row(row: ShownRow, special: Sequence[str], *, ids: bool) -> str:
    text = ""
    for part, learned in row.pieces:
        inside = "".join(
            f"<span class=special>{escape(one)}</span>" if is_special else escape(one)
            for one, is_special in set_apart(part, special)
        )
        text += f"<span class=learned>{inside}</span>" if learned else inside
    numbers = f"<div class=ids>{' '.join(map(str, row.ids))}</div>" if ids else ""
    return (
        f"<div class=row><div class=where><span>{escape(row.title)}</span><span>{_size(row)}</span></div>"
        f"<pre>{text}</pre>{numbers}</div>"
    )
