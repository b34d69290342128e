"""The page of ``lisatune studio``: the watch page, with tabs around it for what comes before and after."""

from __future__ import annotations

from lisatune.pages.html import html_page
from lisatune.studio.studio import Studio
from lisatune.watch.page import HEAD, asset, routes_of
from lisatune.watch.server import POLICY, Answer, Routes

TABS = {"rows": "Model and data", "memory": "Memory", "run": "Run", "chat": "Chat", "export": "Export"}
SCRIPT = '<link rel="stylesheet" href="studio.css"><script type="module" src="studio.js"></script>'


def studio_routes(studio: Studio, token: str) -> Routes:
    """The routes of the studio's page, which holds ``token``: who can read it may change something."""
    tabs = "".join(
        f'<button role="tab" id="tab-{name}" aria-controls="{name}">{title}</button>' for name, title in TABS.items()
    )
    inside = {"run": '<div id="runs"></div><div id="page"></div>'}  # the second is the watch page's
    panels = [
        f'<section role="tabpanel" id="{name}" aria-labelledby="tab-{name}" hidden>{inside.get(name, "")}</section>'
        for name in TABS
    ]
    body = [f'<div role="tablist">{tabs}</div>', *panels, '<aside id="deed"></aside>']
    head = f'{HEAD}{SCRIPT}<meta name="token" content="{token}">'
    page = Answer(
        html_page("lisatune studio", body, wide=True, head=head, policy=POLICY).encode(), "text/html; charset=utf-8"
    )
    return {
        **routes_of(studio.runs),
        "/": lambda query: page,
        "/studio.js": lambda query: asset("studio.js", "text/javascript", "lisatune.studio"),
        "/studio.css": lambda query: asset("studio.css", "text/css", "lisatune.studio"),
    }
