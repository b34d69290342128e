"""What the server of ``lisatune watch`` answers to: the page, its script and style, and what is new in the runs."""

from __future__ import annotations

from importlib.resources import files

from lisatune.pages.html import html_page
from lisatune.watch.rows import parsed
from lisatune.watch.runs import Runs
from lisatune.watch.server import POLICY, Answer, Routes, as_json

HEAD = '<link rel="icon" href="data:,"><link rel="stylesheet" href="watch.css"><script type="module" src="watch.js"></script>'
BODY = ['<div id="page"><p>Loading ...</p></div>', "<noscript><p>This page needs JavaScript.</p></noscript>"]


def routes_of(runs: Runs) -> Routes:
    """The routes of a page that shows ``runs``."""
    page = Answer(
        html_page("lisatune watch", BODY, wide=True, head=HEAD, policy=POLICY).encode(), "text/html; charset=utf-8"
    )
    return {
        "/": lambda query: page,
        "/watch.css": lambda query: asset("watch.css", "text/css"),
        "/watch.js": lambda query: asset("watch.js", "text/javascript"),
        "/draw.js": lambda query: asset("draw.js", "text/javascript"),
        "/news": lambda query: as_json(runs.news(_known(query.get("known", "")))),
    }


def asset(name: str, kind: str, package: str = "lisatune.watch") -> Answer:
    """A file of ``package``."""
    return Answer((files(package) / name).read_bytes(), f"{kind}; charset=utf-8")


def _known(text: str) -> dict[str, str]:
    """What the page has of each run, by the run's id."""
    loaded = parsed(text)
    pairs = loaded.items() if isinstance(loaded, dict) else ()
    return {name: value for name, value in pairs if isinstance(value, str)}
