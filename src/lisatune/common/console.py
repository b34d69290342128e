"""How text reaches the terminal."""

from __future__ import annotations

from rich.console import Console


def tell(console: Console, text: str, *, style: str | None = None) -> None:
    """Print ``text`` as it is: its brackets are no markup, its numbers get no colours, its lines are not broken."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def warn(console: Console, text: str) -> None:
    """Print ``text`` as a warning."""
    tell(console, text, style="yellow")
