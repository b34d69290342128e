"""The one page that reports, comparisons and studies are written on, and runs are watched on."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

# all text is escaped; the policy is a second lock, under which a browser runs no script and loads nothing
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1a1a1a; --paper: #ffffff }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e6e6; --paper: #16181c }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
  background: var(--paper) }}
body.wide {{ max-width: 72rem }}
.figures {{ display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }}
figure {{ margin: 0; min-width: 0; max-width: 38rem }} figcaption {{ font-size: .9rem }} figcaption b {{ display: block }}
svg {{ width: 100%; height: auto }}
.scroll {{ overflow-x: auto }} table {{ border-collapse: collapse; width: 100% }}
td, th {{ text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8884; vertical-align: top }}
.wide table {{ width: auto; font-variant-numeric: tabular-nums }}
.wide td, .wide th {{ text-align: right; white-space: nowrap }}
.wide td:first-child, .wide th:first-child {{ text-align: left }} tr.best td {{ font-weight: 600 }}
pre {{ overflow-x: auto; padding: .8rem; background: #8882; border-radius: .4rem }} li {{ overflow-wrap: anywhere }}
</style>{head}</head><body{kind}>
<h1>{title}</h1>
{body}
</body></html>
"""


def html_page(title: str, body: Sequence[str], *, wide: bool = False, head: str = "", policy: str = POLICY) -> str:
    """A whole page.

    Args:
        title: Its heading; escaped here.
        body: Pieces of HTML, whose text is escaped already.
        wide: For tables of numbers with many columns.
        head: HTML for the head of a page that has a server.
        policy: What a browser may load and run; for a file that is nothing.
    """
    kind = ' class="wide"' if wide else ""
    return PAGE.format(title=escape(title), body="\n".join(body), kind=kind, head=head, policy=policy)


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, best: str | None = None) -> str:
    """A table that scrolls by itself; all cells are escaped. The rows that begin with ``best`` stand out.

    Example:
        >>> html_table(["", ""], [["a < b", "1"]])
        '<div class="scroll"><table><tr></tr><tr><td>a &lt; b</td><td>1</td></tr></table></div>'
    """
    heading = "".join(f"<th>{escape(name)}</th>" for name in head) if any(head) else ""
    lines = [f"<tr>{heading}</tr>"]
    for row in rows:
        mark = ' class="best"' if best is not None and row[0] == best else ""
        lines.append(f"<tr{mark}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'
