"""`lisatune watch`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lisatune.cli.common import console
from lisatune.common.console import tell

if TYPE_CHECKING:
    from lisatune.watch.server import PageServer

ADDRESS = "Address"
Host = Annotated[
    str,
    typer.Option(help="Where to listen. If other machines can reach it, a token is needed.", rich_help_panel=ADDRESS),
]
Port = Annotated[
    int, typer.Option(min=0, max=65535, help="Port to listen on. 0: any free one.", rich_help_panel=ADDRESS)
]


def watch(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of runs or comparisons, or a folder with several of them."),
    ],
    host: Host = "127.0.0.1",
    port: Port = 8421,
) -> None:
    """Watch runs in the browser, while they train and after.

    It only reads the files of the runs, so it cannot slow them.

    Example:
        lisatune watch runs/a runs/b
    """
    from lisatune.watch.page import routes_of
    from lisatune.watch.runs import Runs
    from lisatune.watch.server import PageServer

    watched = Runs(runs)
    with PageServer(routes_of(watched), host, port) as server:
        count = len(watched.all())
        serve(server, f"watching {count:,} run{'s' if count > 1 else ''}")


def serve(server: PageServer, doing: str) -> None:
    """Print where ``server`` is, and answer until Ctrl-C."""
    print(server.url, flush=True)
    tell(console, f"{doing}; Ctrl-C ends it")
    with suppress(KeyboardInterrupt):
        server.serve_forever()
