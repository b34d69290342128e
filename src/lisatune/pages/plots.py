"""Figures of a run as SVG text that takes the colour of the page it stands on."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lisatune.common.loss_names import other_losses

INK = "#010203"  # a colour nobody uses, replaced by the page's own
BLUE, ORANGE, GREEN, PURPLE = "#3b82f6", "#f97316", "#10b981", "#a855f7"
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#14b8a6", "#ec4899", "#b08d00", "#64748b", "#84a31a")
LINES = ("-", "--", ":", "-.")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lisatune",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def loss_curve(rows: Sequence[Mapping[str, Any]], unit: str = "nats per token") -> str:
    """Training loss of each step, thin, its running mean, and the held-out loss."""
    steps = [r["step"] for r in rows if "loss" in r]
    losses = [r["loss"] for r in rows if "loss" in r]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=1)
        axes.plot(steps, running_means(losses), color=BLUE, linewidth=2, label="training, running mean")
        names = list(other_losses(rows[0])) if rows else []
        for name, colour in zip(names or [""], itertools.cycle((ORANGE, GREEN, PURPLE)), strict=False):
            key = f"eval_{name}_loss" if name else "eval_loss"
            held_out = [(r["step"], r[key]) for r in rows if key in r]
            if held_out:
                label = f"held out, {name}" if name else "held out"
                axes.plot(*zip(*held_out, strict=True), "o-", color=colour, markersize=4, label=label)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(f"loss, {unit}")
        axes.legend()
        return svg(figure)


def running_means(values: Sequence[float]) -> list[float]:
    """A running mean of the values, in which each value weighs 0.9 times as much as the next one.

    Divided by the sum of the weights, as Adam's moments are, so that the first values weigh no more than their share.

    Example:
        >>> [round(mean, 3) for mean in running_means([4.0, 2.0, 2.0])]
        [4.0, 2.947, 2.598]
    """
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = 0.9 * total + value, 0.9 * weight + 1
        means.append(total / weight)
    return means


def active_layers(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which decoder layers trained in which step."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.add_subplot()
        points = [(r["step"], layer) for r in rows for layer in r.get("active_layers", [])]
        if points:
            axes.plot(*zip(*points, strict=True), "s", color=GREEN, markersize=2.5)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("decoder layer in training")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        return svg(figure)


def score_curve(rows: Sequence[Mapping[str, Any]]) -> str:
    """Each task's score on the small sample that was scored while training."""
    tasks = dict.fromkeys(task for row in rows for task in row.get("scores") or {})
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for task, colour in zip(tasks, itertools.cycle((ORANGE, GREEN, PURPLE, BLUE)), strict=False):
            points = [(row["step"], row["scores"][task]) for row in rows if task in (row.get("scores") or {})]
            axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=task)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("score")
        axes.legend()
        return svg(figure)


def svg(figure: Figure) -> str:
    """``figure`` as SVG text, its ink in the colour of the text around it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue().replace(INK, "currentColor")
    return text[text.index("<svg") :]
