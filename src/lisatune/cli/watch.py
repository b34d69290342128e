"""`lisatune watch`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated

import typer

from lisatune.cli.common import console
from lisatune.common.console import tell, warn
from lisatune.errors import UserError

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
    for folder in watched.without_runs():
        warn(console, f"{folder}: no run has begun there yet; the page shows it when it does")
    with PageServer(routes_of(watched), host, port) as server:
        count = len(watched.all())
        serve(server, f"watching {count:,} run{'s' if count != 1 else ''}")


def serve(server: PageServer, doing: str) -> None:
    """Print where ``server`` is, and answer until Ctrl-C."""
    print(server.url, flush=True)
    tell(console, f"{doing}; Ctrl-C ends it")
    with suppress(KeyboardInterrupt):
        server.serve_forever()


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Serve the page of ``folder`` from a thread while the block runs, on the usual port or any that is free.

    What the block does is worth more than the page: without a port there is a warning, and no page.
    """
    from lisatune.watch.page import routes_of
    from lisatune.watch.runs import Runs
    from lisatune.watch.server import PORT, PageServer

    server = None
    for port in (PORT, 0):
        with suppress(UserError):
            server = PageServer(routes_of(Runs([folder])), port=port)
            break
    if server is None:
        warn(console, f"no page, because no port is free; later: lisatune watch {folder}")
        yield
        return
    with server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        tell(console, f"watch it: {server.url}")
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
