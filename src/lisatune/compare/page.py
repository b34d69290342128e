"""``report.html`` of a comparison: one self-contained file, drawn from its ``comparison.json``."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lisatune.common.amounts import GIB
from lisatune.compare.table import notes_of, table_of
from lisatune.errors import UserError
from lisatune.pages.html import html_page, html_table
from lisatune.pages.plots import COLOURS, LINES, STYLE, svg

# legible on white and on black
KINDS = {"weights": 0, "gradients": 7, "state": 3, "activations": 2, "temporaries": 4}
KIND_NAMES = {"state": "optimizer state", "temporaries": "loss and other temporaries"}
WIDTH, HEIGHT = 5.0, 3.3  # inches: on a phone's 360 pixels, letters of 11 points become 11 pixels
BESIDE = 4  # names that fit into a figure; more stand below it
LONGEST = 34  # letters of a contender's name in a figure


def write_comparison(folder: Path) -> Path:
    """Draw the comparison in ``folder`` from its comparison.json; needs matplotlib. All of its text is escaped.

    Raises: UserError if ``folder`` holds no comparison.
    """
    try:
        result = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
        settings = (folder / "comparison.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: holds no comparison to report on ({error})") from error
    done = [entry for entry in result["contenders"] if entry["status"] == "finished"]
    methods = dict.fromkeys(entry["method"] for entry in result["contenders"])
    given = yaml.safe_load(settings)
    title = f"{', '.join(methods)}: {Path(str(given.get('model', ''))).name}"
    body = [_about(result), _table(result), _list(notes_of(result))]
    if done:
        body += ['<h2>Figures</h2><div class="figures">', *_figures(result, done), "</div>"]
    body += ["<h2>To repeat it</h2>", f"<pre>{escape(result['command'])}</pre>", f"<pre>{escape(settings)}</pre>"]
    path = folder / "report.html"
    path.write_text(html_page(title, body, wide=True), encoding="utf-8")
    return path


def _about(result: Mapping[str, Any]) -> str:
    made = ", ".join(f"{name} {value}" for name, value in result["made_with"].items())
    text = (
        f"{len(result['contenders'])} contenders, {result['runs_per_contender']} runs each, seeds "
        f"{', '.join(map(str, result['seeds']))}; {result['data']}; {made}."
    )
    return f"<p>{escape(text)}</p>"


def _table(result: Mapping[str, Any]) -> str:
    head, rows = table_of(result)
    done = [e for e in result["contenders"] if e["status"] == "finished"]
    best = min(done, key=lambda e: e["eval_loss"]["mean"])["name"] if done else None
    return html_table(head, rows, best=best)


def _list(notes: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>"


def _figures(result: Mapping[str, Any], done: Sequence[Mapping[str, Any]]) -> list[str]:
    seeds = "mean over the seeds; the band is from the least to the most" if len(result["seeds"]) > 1 else "one seed"
    figures = [
        _figure("Loss against tokens", f"Held out, {seeds}.", partial(_curves, done=done, place="tokens")),
        _figure(
            "Loss against time", "The same over the seconds of the steps.", partial(_curves, done=done, place="seconds")
        ),
        _figure(
            "Loss against memory",
            "Measured peak, less what Python and its libraries hold. Filled: no other has both less memory and less loss.",
            partial(_memory_points, done=done),
        ),
    ]
    if all(entry["bytes_of"] for entry in done):
        text = "Bars: predicted, at the peak. Marks: measured."
        figures.append(_figure("Memory by part", text, partial(_memory_parts, done=done)))
    for name in result["search"]:
        if any(len(_searched(entry, name)) > 1 for entry in done):
            text = f"Mean over the seeds, at the best of what else is searched. A minimum at an end of {name} is not found yet."
            figures.append(_figure(f"Loss against {name}", text, partial(_search, done=done, name=name)))
    for method in dict.fromkeys(entry["method"] for entry in done):
        grid = [entry for entry in done if entry["method"] == method]
        if names := heat_map_names(grid):
            text = "Held-out loss, mean over the seeds, each at its own chosen values."
            title = f"{method}: loss over {names[0]} and {names[1]}"
            figures.append(_figure(title, text, partial(_heat_map, entries=grid, names=names)))
    return figures


def _figure(title: str, caption: str, draw: Callable[[Axes], None]) -> str:
    with mpl.rc_context(STYLE | {"text.parse_math": False}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        draw(figure.add_subplot())
        drawn = svg(figure)
    label = escape(title, quote=True)
    drawn = drawn.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return f"<figure>{drawn}<figcaption><b>{escape(title)}</b>{escape(caption)}</figcaption></figure>"


def _styles(done: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    looks = itertools.cycle([(colour, line) for line in LINES for colour in COLOURS])
    return dict(zip((entry["name"] for entry in done), looks, strict=False))


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def _legend(axes: Axes, count: int) -> None:
    if count <= BESIDE:
        axes.legend(fontsize=9)
    else:
        figure = _grown(axes, HEIGHT + 0.17 * math.ceil(count / 2))
        figure.legend(loc="outside lower center", ncols=2, fontsize=7.5)


def _grown(axes: Axes, height: float) -> Figure:
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.set_figheight(height)
    return figure


def _curves(axes: Axes, done: Sequence[Mapping[str, Any]], place: str) -> None:
    looks = _styles(done)
    for entry in done:
        colour, line = looks[entry["name"]]
        x = [point[place] for point in entry["curve"]]
        axes.plot(
            x, [p["eval_loss"] for p in entry["curve"]], line, color=colour, label=_short(entry["name"]), linewidth=1.8
        )
        if len(entry["eval_loss"]["values"]) > 1:
            least, most = [p["least"] for p in entry["curve"]], [p["most"] for p in entry["curve"]]
            axes.fill_between(x, least, most, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("tokens" if place == "tokens" else "seconds of training")
    axes.set_ylabel("held-out loss")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    _legend(axes, len(done))


def _memory_points(axes: Axes, done: Sequence[Mapping[str, Any]]) -> None:
    looks = _styles(done)
    for entry in done:
        colour, loss = looks[entry["name"]][0], entry["eval_loss"]
        half = None if loss["high"] is None else [[loss["mean"] - loss["low"]], [loss["high"] - loss["mean"]]]
        axes.errorbar(
            [entry["peak_bytes"] / GIB], [loss["mean"]], yerr=half, fmt="o", color=colour, capsize=3,
            fillstyle="full" if entry["frontier"] else "none", label=_short(entry["name"]),
        )  # fmt: skip
    axes.set_xlabel("peak memory, GiB")
    axes.set_ylabel("held-out loss")
    axes.margins(x=0.15)
    _legend(axes, len(done))


def _memory_parts(axes: Axes, done: Sequence[Mapping[str, Any]]) -> None:
    names = [_short(entry["name"]) for entry in done]
    places, ends = list(range(len(done))), [0.0] * len(done)
    for kind, colour in KINDS.items():
        sizes = [
            sum(size for part, size in entry["bytes_of"].items() if part.partition("/")[0] == kind) / GIB
            for entry in done
        ]
        axes.barh(places, sizes, left=ends, color=COLOURS[colour], label=KIND_NAMES.get(kind, kind), height=0.6)
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    measured = [entry["peak_bytes"] / GIB for entry in done]
    axes.plot(measured, places, "|", color="#7d828a", markersize=16, markeredgewidth=2.5, label="measured")
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel("GiB")
    figure = _grown(axes, max(HEIGHT, 1.6 + 0.34 * len(done)))
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)


def _searched(entry: Mapping[str, Any], name: str) -> list[tuple[float, float]]:
    """Value and lowest mean loss, where the values are numbers."""
    best: dict[float, float] = {}
    for tried in entry["by_search"]:
        value, loss = tried["searched"].get(name), tried["eval_loss"]["mean"]
        if isinstance(value, int | float) and not isinstance(value, bool):
            best[value] = min(loss, best.get(value, loss))
    return sorted(best.items())


def _search(axes: Axes, done: Sequence[Mapping[str, Any]], name: str) -> None:
    looks, everywhere = _styles(done), []
    for entry in done:
        if points := _searched(entry, name):
            colour, line = looks[entry["name"]]
            axes.plot(*zip(*points, strict=True), f"o{line}", color=colour, label=_short(entry["name"]), markersize=4)
            everywhere += [value for value, _ in points]
    if min(everywhere) > 0:
        axes.set_xscale("log")
    axes.minorticks_off()
    tried = sorted(set(everywhere))
    if len(tried) <= 12:  # a search tries many
        axes.set_xticks(tried, [f"{value:g}" for value in tried], rotation=45 if len(tried) > 6 else 0)
    axes.set_xlabel(name)
    axes.set_ylabel("held-out loss")
    _legend(axes, len(done))


def heat_map_names(entries: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """The two numbers that alone tell ``entries`` apart; None if there are more, fewer, or others."""
    names = [n for n in entries[0]["varied"] if len({str(entry["varied"].get(n)) for entry in entries}) > 1]
    numbers = [n for n in names if all(type(entry["varied"].get(n)) in (int, float) for entry in entries)]
    return (names[0], names[1]) if len(names) == 2 and numbers == names else None


def _heat_map(axes: Axes, entries: Sequence[Mapping[str, Any]], names: tuple[str, str]) -> None:
    columns, rows = (sorted({entry["varied"][name] for entry in entries}) for name in names)
    losses = {(e["varied"][names[0]], e["varied"][names[1]]): e["eval_loss"]["mean"] for e in entries}
    cells = [[losses.get((column, row), float("nan")) for column in columns] for row in rows]
    mesh = axes.pcolormesh(cells, cmap="viridis_r")
    for (column, row), loss in losses.items():
        red, green, blue, _ = mesh.to_rgba(loss)
        dark = (
            0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.18
        )  # where white and black are as legible
        axes.text(
            columns.index(column) + 0.5, rows.index(row) + 0.5, f"{loss:.4f}", ha="center", va="center", fontsize=9,
            color="#ffffff" if dark else "#000000",
        )  # fmt: skip
    axes.invert_yaxis()
    axes.set_xticks([i + 0.5 for i in range(len(columns))], [f"{column:g}" for column in columns])
    axes.set_yticks([i + 0.5 for i in range(len(rows))], [f"{row:g}" for row in rows])
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    axes.figure.colorbar(mesh, ax=axes)
