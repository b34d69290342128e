"""An inspection of data, for the terminal and as a page."""

from __future__ import annotations

from collections.abc import Iterator
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
LEARNT, CONTEXT = "bold green", "dim"
MOST_LETTERS = 1500  # of a row in the terminal

STYLE = """<style>
.row { border: 1px solid #8884; border-radius: 8px; margin: 1em 0; padding: .6em 1em; }
.row pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .4em 0 0; line-height: 1.45; }
.row .where { opacity: .65; font-size: .85em; }
.learnt { background: #2da44e33; border-bottom: 2px solid #2da44e; border-radius: 2px; }
.ids { opacity: .6; font-size: .8em; overflow-wrap: anywhere; }
.bar { display: inline-block; height: .8em; background: #2da44e; } .bar.over { background: #cf222e; }
</style>"""


def show(found: Inspection, *, ids: bool = False) -> RenderableType:
    """The inspection for a terminal: files, rows, lengths, and a few rows with what is learnt in green."""
    parts: list[RenderableType] = [Rule(", ".join(found.names), style="cyan")]
    parts += [_files(found), _rows(found), _lengths(found)]
    legend = Text.assemble(("learnt", LEARNT), (" and ", ""), ("context", CONTEXT), (f", {len(found.rows)} rows", ""))
    parts += [Rule(legend, style="cyan"), *(_panel(row, ids=ids) for row in found.rows)]
    return Group(*parts)


def _files(found: Inspection) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("file", "rows", "split", ""):
        table.add_column(name, justify="right" if name == "rows" else "left", header_style="cyan", overflow="fold")
    for file in found.read:
        note = Text(file.note or "read", style="green")
        table.add_row(Text(file.path.name), f"{file.num_rows:,}", Text(file.split or ""), note)
    for file, rows in found.left_out:
        told = "" if rows is None else f"{rows:,}"
        table.add_row(
            Text(file.path.name), told, Text(file.split or ""), Text(f"left out: {file.left_out}"), style="dim"
        )
    if not found.read:
        return Padding(Text("\n".join(found.described)), (0, 0, 1, 0))
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
    table.add_row(f"{counts.labelled_tokens:,}", Text(f"of them learnt, {share:.0%}", style=LEARNT))
    bad = [Text(message, style="red") for message in counts.bad]
    return Padding(Group(table, *bad), (0, 0, 1, 0))


def _lengths(found: Inspection) -> RenderableType:
    bars = histogram(found.lengths)
    most = max((count for _, _, count in bars), default=0)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    marked = False
    for first, last, count in bars:
        if first > found.max_length and not marked:
            table.add_row("", Text("─" * 12 + f" max_length={found.max_length} ", style="yellow"), "")
            marked = True
        style = "red" if marked else "green"
        table.add_row(f"{first:,}-{last:,}", Text(_bar(count, most), style=style), f"{count:,}" if count else "")
    plain, packed = found.padding
    notes = Text(
        f"padding {plain:.0%} of the tokens computed at {found.batch_size} rows a batch, {packed:.0%} with packing=true; longest row "
        f"{max(found.lengths, default=0):,} tokens, max_length {found.max_length:,}"
    )
    return Padding(Group(Text("tokens of a row", style="cyan"), table, notes), (0, 0, 1, 0))


def _bar(count: int, most: int) -> str:
    eighths = round(8 * BAR * count / most) if most else 0
    text = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]
    return text.strip() or ("▏" if count else "")


def _panel(row: ShownRow, *, ids: bool) -> Panel:
    text, room = Text(), MOST_LETTERS
    for part, learnt in row.pieces:
        shown = part if len(part) <= room else part[:room] + " ..."
        text.append(shown, style=LEARNT if learnt else CONTEXT)
        room -= len(shown)
        if room <= 0:
            break
    body: RenderableType = text
    if ids:
        numbers = Text()
        for token, label in zip(row.ids, row.labels, strict=True):
            numbers.append(f"{token} ", style=LEARNT if label != -100 else CONTEXT)
        body = Group(text, Text(), numbers)
    num_learnt = sum(label != -100 for label in row.labels)
    return Panel(
        body, title=Text(row.where), title_align="left", subtitle=f"{len(row.ids):,} tokens, {num_learnt:,} learnt",
        subtitle_align="right", border_style="dim",
    )  # fmt: skip


# -- as a page -------------------------------------------------------------------------------------------------------


def write_page(found: Inspection, path: Path, *, ids: bool = False) -> Path:
    """A page of its own with all that ``show`` shows, and every row whole; returns ``path``."""
    write_whole(path, html_page(", ".join(found.names), [STYLE, *_page(found, ids=ids)]))
    return path


def _page(found: Inspection, *, ids: bool) -> Iterator[str]:
    counts = found.counts
    files = [[file.path.name, f"{file.num_rows:,}", file.split or "", file.note or "read"] for file in found.read]
    files += [
        [file.path.name, "" if rows is None else f"{rows:,}", file.split or "", f"left out: {file.left_out}"]
        for file, rows in found.left_out
    ]
    yield "<h2>Files</h2>" + html_table(["file", "rows", "split", ""], files)
    numbers = [["rows read", f"{counts.read:,}"], ["used", f"{counts.used:,}"]]
    numbers += [[f"refused: {reason}", f"{number:,}"] for reason, number in counts.reasons.most_common()]
    numbers += [[f"have {name}, which is not used", f"{number:,}"] for name, number in counts.left_out.most_common()]
    numbers += [["tokens", f"{counts.tokens:,}"], ["learnt", f"{counts.labelled_tokens:,}"]]
    numbers += [["cut at max_length", f"{counts.truncated:,} rows, {counts.cut_tokens:,} tokens"]]
    numbers += [["padding", f"{found.padding[0]:.0%}; with packing {found.padding[1]:.0%}"]]
    yield "<h2>Rows</h2>" + html_table(["", ""], numbers)
    yield "<h2>Tokens of a row</h2>" + _bars(found)
    yield f"<h2>{len(found.rows):,} rows</h2><p>What is learnt is <span class=learnt>marked</span>.</p>"
    yield from (_html_row(row, ids=ids) for row in found.rows)


def _bars(found: Inspection) -> str:
    bars = histogram(found.lengths)
    most = max((count for _, _, count in bars), default=0) or 1
    lines = []
    for first, last, count in bars:
        kind = "bar over" if first > found.max_length else "bar"
        lines.append(
            f"<tr><td>{first:,}-{last:,}</td><td><span class='{kind}' style='width:{24 * count / most:.2f}em'></span> {count:,}</td></tr>"
        )
    return f"<table>{''.join(lines)}</table><p>max_length is {found.max_length:,}.</p>"


def _html_row(row: ShownRow, *, ids: bool) -> str:
    text = "".join(f"<span class=learnt>{escape(t)}</span>" if learnt else escape(t) for t, learnt in row.pieces)
    numbers = f"<div class=ids>{' '.join(map(str, row.ids))}</div>" if ids else ""
    return f"<div class=row><div class=where>{escape(row.where)}, {len(row.ids):,} tokens</div><pre>{text}</pre>{numbers}</div>"
