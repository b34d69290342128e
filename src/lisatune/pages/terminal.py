"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text


@dataclass
class Tables:
    """Tables with as many columns as fit the width. Each begins with the first column. No number is cut off."""

    head: list[str]
    rows: list[list[str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        widths = [max(len(row[i]) for row in (self.head, *self.rows)) + 3 for i in range(len(self.head))]
        begin = 1
        while begin < len(widths):
            end = begin + 1
            while end < len(widths) and 1 + widths[0] + sum(widths[begin : end + 1]) <= options.max_width:
                end += 1
            table = Table(self.head[0])
            for name in self.head[begin:end]:
                table.add_column(Text(name), justify="right", no_wrap=True)
            for row in self.rows:
                table.add_row(Text(row[0]), *(Text(cell) for cell in row[begin:end]))
            yield table
            begin = end
