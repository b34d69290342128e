"""Scores by category as a radar: one closed line for each model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes

from lisatune.pages.plots import COLOURS, LINES, STYLE, svg

LEAST_CORNERS = 3
# the drawing stands alone, so it says itself what its ink is
INK_OF_PAGE = "<style>svg{color:#1a1a1a}@media(prefers-color-scheme:dark){svg{color:#e6e6e6}}</style>"


def radar(categories: Sequence[str], scores: Mapping[str, Sequence[float | None]], *, highest: float = 10.0) -> str:
    """SVG text of a radar with a corner for each of ``categories``, legible on white and on black.

    Args:
        categories: Three or more.
        scores: Scores of each model, one for each category, from 0 to ``highest``; None leaves a gap.
    Example:
        >>> drawn = radar(["writing", "maths", "coding"], {"LISA": [7.0, 2.5, None], "LoRA": [6.0, 3.0, 4.0]})
        >>> drawn.startswith("<svg"), all(word in drawn for word in ("writing", "maths", "coding", "LISA", "LoRA"))
        (True, True)
    """
    angles = [2 * math.pi * i / len(categories) for i in range(len(categories))]
    with mpl.rc_context(STYLE | {"text.parse_math": False}):
        figure = Figure(figsize=(6, 5.4), layout="constrained")
        axes = figure.add_subplot(projection="polar")
        assert isinstance(axes, PolarAxes)
        axes.set_theta_offset(math.pi / 2)
        axes.set_theta_direction(-1)
        for number, (name, values) in enumerate(scores.items()):
            colour, line = COLOURS[number % len(COLOURS)], LINES[number % len(LINES)]
            found = [math.nan if value is None else value for value in values]
            axes.plot(
                [*angles, angles[0]], [*found, found[0]], line, marker="o", markersize=4, color=colour, label=name
            )
            if not any(map(math.isnan, found)):
                axes.fill(angles, found, color=colour, alpha=0.08)
        axes.set_xticks(angles, list(categories))
        for text, angle in zip(axes.get_xticklabels(), angles, strict=True):
            side = math.sin(angle)  # a name stands outside of the rim, on its side
            text.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
        axes.set_ylim(0, highest)
        axes.grid(color="#7d828a", alpha=0.4)
        axes.tick_params(axis="x", pad=6)
        figure.legend(loc="outside lower center", ncols=min(3, max(1, len(scores))))
        drawn = svg(figure)
    label = f"scores of {', '.join(scores)} by category"
    return _named(drawn, label)


def _named(drawn: str, label: str) -> str:
    """With its ink, and a name for those who cannot see it."""
    start = drawn.index(">") + 1
    opening = drawn[:start].replace("<svg", f'<svg role="img" aria-label="{escape(label, quote=True)}"', 1)
    return f"{opening}{INK_OF_PAGE}{drawn[start:]}"
