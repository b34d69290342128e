"""The study of layers: what ``norms.jsonl`` of one run or several says, as tables, words and figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lisatune.errors import UserError
from lisatune.pages.html import html_page, html_table
from lisatune.study.norms_file import NORMS, read_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SKEWED = (
    2.0  # the largest part this many times the median decoder layer: a word needs a bound, the numbers stand beside
)
MOST_COLUMNS = 60  # columns of a heat map: each cell is 100 bytes of the page or more
# measure: what tables call it
MEASURES = {
    "mean_norm": "the paper's mean norm",
    "start": "its value at step 0",
    "growth": "mean norm less step 0",
    "adapter_change": "change of the adapters",
    "first_change": "change of the weights at first",
    "change": "change of the weights",
    "relative_change": "change / norm of the weights",
    "change_per_weight": "change / root of their number",
}


@dataclass(frozen=True)
class NormRun:
    """What a run recorded.

    Args:
        name: Name of its folder.
        method: lisa, lora or full.
        learning_rate: Its largest learning rate.
        steps: Recorded steps, from 0.
        parts: Part to its values at each of ``steps``.
    """

    name: str
    method: str
    learning_rate: float
    steps: list[int]
    parts: dict[str, list[dict[str, Any]]]

    @property
    def layers(self) -> list[str]:
        """The parts that are compared: embedding, decoder layers, head. Norms are vectors, and a matter apart."""
        return [part for part in self.parts if part in ("embedding", "head") or part.startswith("layers.")]

    def series(self, part: str, key: str) -> list[float]:
        """A value at each step; NaN where it was not finite."""
        return [float(values.get(key, math.nan)) for values in self.parts[part]]


def read_norms(folder: Path) -> NormRun:
    """What is recorded in a run's folder, of a run under way too.

    Raises: UserError if there is no such record, or it cannot be read.
    """
    path = folder / NORMS
    if not path.is_file():
        raise UserError(f"{folder}: holds no {NORMS}: train with norm_steps=<every so many steps>")
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
        lines = [line for line in map(read_line, texts) if line is not None]
        if len(lines) < len(texts) - 1 or not lines:  # the last one may be half written
            raise ValueError("a line is no record of norms")
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        steps = [line["step"] for line in lines]
        parts = {part: [line["parts"][part] for line in lines] for part in lines[0]["parts"]}
        run = NormRun(folder.resolve().name, str(config["method"]), float(config["learning_rate"]), steps, parts)
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    if len(steps) < 2 or steps[0] != 0:
        raise UserError(f"{path} does not hold step 0 and a later one, so there is nothing to compare")
    return run


def study(runs: Sequence[NormRun]) -> dict[str, Any]:
    """Tables, skewness and verdict of ``runs``, for ``--json``.

    Skewness of a measure is ``ratio``, its largest value of a part divided by the median decoder layer's, with
    ``largest`` the name of that part; and ``share``, what embedding and head have of the sum over all of these parts.
    The median is of decoder layers that trained. ``change`` is that of the last line, ``first_change`` that of the first one
    in which anything has moved: with a line a step what Adam's first update does, by which every weight moves as far as
    any other, whatever its gradient; so it shows the shapes and the parametrisation, and no learning. Norms add up over more weights in a larger part, whatever each of them
    does: relative change and change per weight are the measures without that.

    Returns: ``{"runs": [{"run", "method", "learning_rate", "steps", "layers": [...], "skewness": {...}, "verdict"}],
        "verdict"}``.
    """
    studies = [_study(run) for run in runs]
    return {"runs": studies, "verdict": _compare(studies)}


def _study(run: NormRun) -> dict[str, Any]:
    moved = next(
        (i for i in range(len(run.steps)) if any(run.series(part, "change")[i] > 0 for part in run.layers)), -1
    )
    rows = [_row(run, part, moved) for part in run.parts]
    compared = {row["part"]: row for row in rows if row["part"] in run.layers}
    skewness = {}
    for measure in MEASURES:
        values = {part: row[measure] for part, row in compared.items() if row[measure] is not None}
        if values:
            skewness[measure] = skewness_of(values)
    result = {
        "run": run.name, "method": run.method, "learning_rate": run.learning_rate, "steps": run.steps[-1],
        "recorded": len(run.steps), "layers": rows, "skewness": skewness,
    }  # fmt: skip
    return result | {"verdict": _verdict(result)}


def _row(run: NormRun, part: str, moved: int) -> dict[str, Any]:
    first, last = run.parts[part][0], run.parts[part][-1]
    change, start, mean = (values.get(key) for values, key in ((last, "change"), (first, "norm"), (last, "mean_norm")))
    base, number = first.get("base_norm"), first.get("num_weights")
    return {
        "part": part, "start": start, "mean_norm": mean, "end": last.get("norm"),
        "growth": None if mean is None or start is None else abs(mean - start),
        "a_norm": last.get("a_norm"), "b_norm": last.get("b_norm"), "adapter_change": last.get("adapter_change"),
        "first_change": run.parts[part][moved].get("change"), "change": change,
        "relative_change": change / base if change is not None and base else None,
        "change_per_weight": change / math.sqrt(number) if change is not None and number else None,
        "rank": last.get("rank"), "stable_rank": last.get("stable_rank"), "updates": last.get("updates"),
    }  # fmt: skip


def skewness_of(values: Mapping[str, float]) -> dict[str, Any]:
    """How much some parts stand out.

    Example:
        >>> skewness_of({"embedding": 724.0, "layers.0": 17.0, "layers.1": 18.0, "head": 6.5})
        {'ratio': 41.3..., 'largest': 'embedding', 'share': 0.95...}
    """
    inner = [value for part, value in values.items() if part.startswith("layers.") and value > 0]
    largest = max(values, key=lambda part: values[part])
    total = sum(values.values())
    outer = sum(value for part, value in values.items() if not part.startswith("layers."))
    return {
        "ratio": values[largest] / median(inner) if inner else None,
        "largest": largest,
        "share": outer / total if total else None,
    }


def _verdict(result: Mapping[str, Any]) -> str:
    """Whether the skewness is there, and whether it still is without step 0."""
    skewness = result["skewness"]
    paper, largest = skewness.get("mean_norm"), skewness.get("mean_norm", {}).get("largest")
    growths = {
        row["part"]: row["mean_norm"] / row["start"] - 1
        for row in result["layers"]
        if row["mean_norm"] and row["start"]
    }
    furthest = max(growths, key=lambda part: abs(growths[part]), default=None)
    text = f"{result['run']}: by the paper's mean norm, {_in_words(paper)}. Before the first step, {_in_words(skewness.get('start'))}. "
    if largest in growths and furthest is not None:
        text += (
            f"The mean of {largest} is {growths[largest]:+.1%} from its value at step 0; furthest is that of {furthest}, "
            f"{growths[furthest]:+.1%}. "
        )
    return text + (
        f"With step 0 taken away, by the change of the weights, {_in_words(skewness.get('change'))}; in relation to the "
        f"size of its weights, {_in_words(skewness.get('relative_change'))}; for each weight, "
        f"{_in_words(skewness.get('change_per_weight'))}. When anything had moved for the first time, by the change of the "
        f"weights, {_in_words(skewness.get('first_change'))}."
    )


def _in_words(skewness: Mapping[str, Any] | None) -> str:
    if skewness is None or skewness["ratio"] is None:
        return "no decoder layer has a value"
    is_skewed = "skewed" if skewness["ratio"] >= SKEWED else "not skewed"
    return f"it is {is_skewed} ({skewness['largest']} is the largest, {skewness['ratio']:.3g} times the median decoder layer)"


def _compare(studies: Sequence[Mapping[str, Any]]) -> str:
    """LoRA against full, which is the paper's comparison; empty without one run of each."""
    lora, full = (next((s for s in studies if s["method"] == method), None) for method in ("lora", "full"))
    if lora is None or full is None:
        return ""
    lines = []
    for measure in ("mean_norm", "start", "first_change", "change", "relative_change", "change_per_weight"):
        a, b = (t["skewness"].get(measure, {}).get("ratio") for t in (lora, full))
        if a and b:
            lines.append(f"{MEASURES[measure]} {a:.3g} in LoRA against {b:.3g} in full ({a / b:.2g} times)")
    return "Largest part over the median decoder layer: " + "; ".join(lines) + "."


COLUMNS: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "start": ("norm at step 0", lambda row: _number(row["start"])),
    "mean_norm": ("mean norm", lambda row: _number(row["mean_norm"])),
    "end": ("norm at the end", lambda row: _number(row["end"])),
    "adapter_change": ("change of adapters", lambda row: _number(row["adapter_change"])),
    "change": ("change", lambda row: _number(row["change"])),
    "relative_change": ("relative", lambda row: _percent(row["relative_change"])),
    "change_per_weight": ("per weight", lambda row: _number(row["change_per_weight"])),
    "rank": ("effective rank", lambda row: _number(row["rank"])),
    "stable_rank": ("stable rank", lambda row: _number(row["stable_rank"])),
    "updates": ("updates", lambda row: f"{row['updates']:,}"),
}


def tables(result: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, headings and cells: one table for each run, and one of skewness for all."""
    found = []
    for run in result["runs"]:
        used = [key for key in COLUMNS if any(row[key] is not None for row in run["layers"])]
        cells = [[row["part"], *(COLUMNS[key][1](row) for key in used)] for row in run["layers"]]
        title = f"{run['run']}: {run['method']}, learning rate {run['learning_rate']:g}, {run['steps']:,} steps"
        found.append((title, ["part", *(COLUMNS[key][0] for key in used)], cells))
    heads = [
        "largest part / median decoder layer (share of embedding and head)",
        *(run["run"] for run in result["runs"]),
    ]
    measures = [m for m in MEASURES if any(m in run["skewness"] for run in result["runs"])]
    cells = [[MEASURES[m], *(_skewness_cell(run["skewness"].get(m)) for run in result["runs"])] for m in measures]
    return [*found, ("skewness", heads, cells)]


def _skewness_cell(skewness: Mapping[str, Any] | None) -> str:
    if skewness is None or skewness["ratio"] is None:
        return "-"
    return f"{skewness['ratio']:.3g}, {skewness['largest']} ({skewness['share']:.0%})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.3%}"


def show(result: Mapping[str, Any]) -> RenderableType:
    """The study for the terminal."""
    shown: list[RenderableType] = []
    for title, heads, cells in tables(result):
        table = Table(title=Text(title), title_justify="left")
        for i, head in enumerate(heads):
            table.add_column(Text(head), justify="right" if i else "left")
        for row in cells:
            table.add_row(*map(Text, row))
        shown += [table, Text()]
    return Group(*shown, *(Text(verdict + "\n") for verdict in _verdicts(result)))


def _verdicts(result: Mapping[str, Any]) -> list[str]:
    return [verdict for verdict in (*(run["verdict"] for run in result["runs"]), result["verdict"]) if verdict]


def write_page(runs: Sequence[NormRun], path: Path) -> Path:
    """``norms.html``: tables, verdicts and figures in one self-contained file, all text escaped; needs matplotlib."""
    result = study(runs)
    body = [f"<p>{escape(verdict)}</p>" for verdict in _verdicts(result)]
    *of_runs, skewness = [_titled_table(*table) for table in tables(result)]
    body += [skewness, "<h2>Side by side</h2>", draw("side by side", runs)]
    for run, table in zip(runs, of_runs, strict=True):
        body += [table, draw("heat maps", [run])]
    path.write_text(html_page("Norms of layers", body), encoding="utf-8")
    return path


def _titled_table(title: str, heads: list[str], cells: list[list[str]]) -> str:
    return f"<h2>{escape(title)}</h2>{html_table(heads, cells)}"


def draw(kind: str, runs: Sequence[NormRun]) -> str:
    """A figure as SVG text: ``side by side``, the paper's figure with what it leaves out, or ``heat maps`` of one run."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from lisatune.pages.plots import STYLE, svg

    figures = {"side by side": _side_by_side, "heat maps": _heat_maps}
    with mpl.rc_context(STYLE):
        figure = Figure(layout="constrained")
        figures[kind](figure, runs)
        return svg(figure)


def _side_by_side(figure: Figure, runs: Sequence[NormRun]) -> None:
    """Above: the paper's mean norm and its value at step 0; below: change in relation to the weights' size."""
    from matplotlib.ticker import NullFormatter, PercentFormatter

    from lisatune.pages.plots import BLUE, GREEN, ORANGE

    figure.set_size_inches(max(7, 2.6 * len(runs)), 5.4)
    axes = figure.subplots(2, len(runs), sharey="row", squeeze=False)
    for run, above, below in zip(runs, *axes, strict=True):
        rows = {row["part"]: row for row in _study(run)["layers"]}
        above.set_title(run.name.replace("$", r"\$"), fontsize=11)
        for key, label, style in (("mean_norm", "mean norm", "o-"), ("start", "at step 0", "x:")):
            values = [_positive(rows[part][key]) for part in run.layers]
            above.plot(values, style, color=BLUE if key == "mean_norm" else ORANGE, markersize=5, label=label)
        below.plot([_positive(rows[part]["relative_change"]) for part in run.layers], "o-", color=GREEN, markersize=5)
        for ax in (above, below):
            if any(line.get_ydata().size and not all(map(math.isnan, line.get_ydata())) for line in ax.lines):
                ax.set_yscale("log")
            _name_layers(ax, run.layers, along_x=True)
    for ax in axes[1]:
        if ax.get_yscale() == "log":
            ax.yaxis.set_major_formatter(PercentFormatter(1.0))
            ax.yaxis.set_minor_formatter(NullFormatter())
    axes[0][0].set_ylabel("L2 norm of what trains")
    axes[1][0].set_ylabel("change / norm of weights")
    axes[0][0].legend()


def _heat_maps(figure: Figure, runs: Sequence[NormRun]) -> None:
    """Layer by step: the change so far, and in what share of the steps the layer trained."""
    from matplotlib.colors import LogNorm

    [run] = runs
    figure.set_size_inches(7, 1.6 + 0.36 * len(run.layers))
    picked = _columns(len(run.steps))
    edges = [run.steps[i] for i in picked]
    changes, shares = [], []
    for part in run.layers:
        change, updates = run.series(part, "change"), run.series(part, "updates")
        changes.append([_positive(change[i]) for i in picked[1:]])
        pairs = list(pairwise(picked))
        shares.append([_positive((updates[j] - updates[i]) / (run.steps[j] - run.steps[i])) for i, j in pairs])
    above, below = figure.subplots(2, 1, sharex=True)
    rows = [i - 0.5 for i in range(len(run.layers) + 1)]
    finite = [value for row in changes for value in row if not math.isnan(value)] or [1.0]
    log = LogNorm(min(finite), max(max(finite), min(finite) * 1.01))
    for ax, values, label, scale in (
        (above, changes, "norm of the change", {"norm": log}),
        (below, shares, "share of steps in training", {"vmin": 0, "vmax": 1}),
    ):
        mesh = ax.pcolormesh(edges, rows, values, cmap="viridis", edgecolors="face", linewidth=0.2, **scale)
        bar = figure.colorbar(mesh, ax=ax, label=label)
        assert bar.solids is not None
        bar.solids.set(rasterized=False, edgecolor="face")  # no picture inside of the drawing
        _name_layers(ax, run.layers, along_x=False)
    below.set_xlabel("optimizer step")


def _columns(number: int) -> list[int]:
    """Indices of at most ``MOST_COLUMNS`` + 1 of ``number`` recorded steps, the first and the last among them."""
    stride = math.ceil((number - 1) / MOST_COLUMNS)
    return [*range(0, number - 1, stride), number - 1]


def _positive(value: float | None) -> float:
    """For a scale that has no 0: a layer that has not moved is a gap."""
    return math.nan if value is None or not math.isfinite(value) or value <= 0 else value


def _name_layers(ax: Axes, layers: Sequence[str], *, along_x: bool) -> None:
    """Ticks: embedding, head, and as many of the decoder layers' numbers as there is room for."""
    stride = math.ceil(len(layers) / 10)
    places = [i for i, part in enumerate(layers) if not part.startswith("layers.") or i % stride == 0]
    names = [layers[i].removeprefix("layers.").replace("embedding", "emb.") for i in places]
    if along_x:
        ax.set_xticks(places, names, fontsize=9)
    else:
        ax.set_yticks(places, names)
