"""Forecasts for people: a table, bars, and what fits, in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lisatune.common.amounts import gib
from lisatune.plan.forecast import LEFT_OUT, Plan
from lisatune.plan.ladder import Rung, pulled

KINDS = {
    "weights": ("weights", "blue"),
    "gradients": ("gradients", "yellow"),
    "state": ("optimizer state", "magenta"),
    "gathered": ("weights gathered from others", "cyan"),
    "reference": ("reference model", "bright_blue"),
    "activations": ("activations", "green"),
    "temporaries": ("loss and other temporaries", "red"),
}
PARTS = {"decoder": "decoder layers and norm", "embedding": "embedding", "head": "head"}
BAR_WIDTH = 60


def show_plans(
    plans: Sequence[Plan], budget: int | None = None, refused: Mapping[str, str] | None = None
) -> RenderableType:
    """Methods side by side: bytes by part as a table, then as bars on one scale; why a method is missing."""
    missing = [Text(f"no {method} here: {reason}") for method, reason in (refused or {}).items()]
    return Group(_table(plans), Text(), _bars(plans, budget), *missing, Text(_notes(plans), style="dim"))


def _table(plans: Sequence[Plan]) -> Table:
    whose = f" of each of {plans[0].num_ranks} processes" if plans[0].num_ranks > 1 else ""
    table = Table(
        title=f"predicted peak{whose}, micro-batch {plans[0].rows} x {plans[0].tokens} tokens", title_justify="left"
    )
    table.add_column("")
    for plan in plans:
        table.add_column(plan.method, justify="right")
    table.add_row("parameters trained at a time", *(f"{p.num_trained:,}" for p in plans))
    for kind, (name, _) in _kinds(plans).items():
        if f"{kind}/decoder" not in plans[0].bytes_of:
            table.add_row(name, *(gib(p.bytes_of[kind]) for p in plans))
            continue
        for part, description in PARTS.items():
            sizes = [p.bytes_of[f"{kind}/{part}"] for p in plans]
            table.add_row(f"{name}, {description}", *(gib(size) if size else "-" for size in sizes))
    table.add_section()
    table.add_row("[bold]peak", *(f"[bold]{gib(p.peak_bytes)}" for p in plans))
    table.add_row("reached", *(p.peak_at.removeprefix("in the ").removeprefix("at the ") for p in plans))
    if any(p.host_bytes for p in plans):
        table.add_row("in host memory", *(gib(p.host_bytes) if p.host_bytes else "-" for p in plans))
    if plans[0].num_ranks > 1:
        for kind in ("weights", "gradients"):
            sizes = [p.sent_bytes_of.get(kind, 0) for p in plans]
            table.add_row(f"sent in a step, {kind}", *(gib(size) if size else "-" for size in sizes))
    return table


def _kinds(plans: Sequence[Plan]) -> dict[str, tuple[str, str]]:
    """Without what none of them has."""
    return {
        kind: shown
        for kind, shown in KINDS.items()
        if kind not in ("gathered", "reference") or any(p.total(kind) for p in plans)
    }


def _bars(plans: Sequence[Plan], budget: int | None) -> Text:
    scale = BAR_WIDTH / max([p.peak_bytes for p in plans] + [budget or 0])
    width = max(len(p.method) for p in plans)
    text = Text()
    for plan in plans:
        text.append(f"{plan.method:>{width}} ")
        drawn = total = 0
        for kind, (_, colour) in _kinds(plans).items():
            total += plan.total(kind)
            cells = round(total * scale) - drawn
            text.append("█" * cells, style=colour)
            drawn += cells
        text.append(f" {gib(plan.peak_bytes)}")
        text.append("\n")
    if budget is not None:
        text.append(" " * (width + 1) + " " * max(0, round(budget * scale) - 1) + f"↑ budget {gib(budget)}\n")
    text.append(" " * (width + 1))
    for name, colour in _kinds(plans).values():
        text.append("█ ", style=colour).append(f"{name}  ")
    return text


def _notes(plans: Sequence[Plan]) -> str:
    remarks = list(dict.fromkeys(plan.remark for plan in plans if plan.remark))
    return "\n".join([*remarks, LEFT_OUT[plans[0].device]])


def show_rungs(rungs: Sequence[Rung], budget: int, reach: dict[str, int]) -> RenderableType:
    """The levers pulled one after another, and what fits with the last of them."""
    table = Table(title=f"levers for method={rungs[0].plan.method}, the cheapest in time first", title_justify="left")
    for column in ("lever added", "peak", "in host memory", f"fits {gib(budget)}"):
        table.add_column(column, justify="left" if column == "lever added" else "right")
    for rung in rungs:
        host = gib(rung.plan.host_bytes) if rung.plan.host_bytes else "-"
        fits = "yes" if rung.plan.peak_bytes <= budget else "no"
        table.add_row(rung.lever or "none", gib(rung.plan.peak_bytes), host, fits)
    lines = [f"{name}: {value:,}" for name, value in reach.items()]
    levers = pulled(rungs[0], rungs[-1])
    if levers:
        lines.append(f"train with: {levers}")
    return Group(table, Text("the most that fits, if you raise only one of these:"), *map(Text, lines))
