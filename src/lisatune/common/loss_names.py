"""Held-out losses by name, as metrics and summaries hold them and people read them. Needs no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

MUCH_PADDING = 0.2  # of what a run computes: then it is told


def named_losses(losses: Mapping[str, float]) -> dict[str, float | None]:
    """Held-out losses as metrics are named: ``eval_loss``, the first, and each with a name as ``eval_<name>_loss``.

    Example:
        >>> named_losses({"math": 2.0, "general": 3.0})
        {'eval_loss': 2.0, 'eval_math_loss': 2.0, 'eval_general_loss': 3.0}
    """
    first = next(iter(losses.values()), None)
    return {"eval_loss": first} | {f"eval_{name}_loss": loss for name, loss in losses.items() if name}


def other_losses(numbers: Mapping[str, Any], ending: str = "") -> dict[str, float]:
    """Name to loss of the held-out sets that have names, the first of them too.

    Example:
        >>> other_losses({"eval_loss_after": 2.0, "eval_math_loss_after": 2.0, "eval_general_loss_after": 3.0}, "_after")
        {'math': 2.0, 'general': 3.0}
    """
    found = ((re.fullmatch(rf"eval_(.+)_loss{ending}", name), value) for name, value in numbers.items())
    return {match[1]: value for match, value in found if match}


def ending_lines(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Lines on a run that stopped early, on a trained model that is not the last one, and on much padding.

    Example:
        >>> dict(ending_lines({"steps": 60, "planned_steps": 100, "best_step": 40}))
        {'stopped early': 'after 60 of 100 steps', 'trained model': 'that of step 40, the best of all evaluated'}
    """
    if "planned_steps" in summary:
        yield "stopped early", f"after {summary['steps']:,} of {summary['planned_steps']:,} steps"
    if "best_step" in summary:
        yield "trained model", f"that of step {summary['best_step']:,}, the best of all evaluated"
    if (share := summary.get("padding_share", 0.0)) >= MUCH_PADDING:
        yield (
            "padding",
            f"{share:.0%} of what was computed; lisatune data shows what packing or group_by_length would save",
        )


def loss_lines(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A line for each held-out set: its name, and loss and (of text) perplexity before and after."""
    before, after = (other_losses(summary, ending) for ending in ("_before", "_after"))
    if not before and summary.get("eval_loss_before") is not None:
        before, after = {"": summary["eval_loss_before"]}, {"": summary["eval_loss_after"]}
    for name in before:
        a, b = before[name], after[name]
        label = f"held-out loss, {name}" if name else "held-out loss"
        judged = summary.get("task", "sft") != "sft"  # whose loss is of no single token
        yield label, f"{a:.4f} -> {b:.4f}" + ("" if judged else f" (perplexity {_perplexity(a)} -> {_perplexity(b)})")


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.4g}" if loss < 700 else "infinite"
