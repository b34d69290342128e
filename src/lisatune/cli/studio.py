"""`lisatune studio`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from lisatune.cli.common import quiet_libraries
from lisatune.cli.watch import Host, Port, serve


def studio(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FOLDER]...",
            help="Folders that it may use. Runs go into the first one, into runs/. Default: the current one.",
        ),
    ] = None,
    host: Host = "127.0.0.1",
    port: Port = 8421,
) -> None:
    """Choose data, train, watch, chat and export in the browser.

    Each click is a config file and a command, and both are shown.

    Example:
        lisatune studio
    """
    quiet_libraries()
    from lisatune.studio.page import studio_routes
    from lisatune.studio.places import Places
    from lisatune.studio.studio import Studio
    from lisatune.watch.server import PageServer, new_token

    room = Studio(Places(folders or [Path.cwd()]))
    os.chdir(room.home)  # names without a folder are looked up there, as the commands look them up
    token = new_token()
    with PageServer(studio_routes(room, token), host, port, posts=room.posts(), token=token) as server:
        serve(server, f"studio of {room.home}; runs go on when it ends")
