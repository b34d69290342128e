"""What training in the Trainer holds, expected and measured, and a page about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lisatune.common.amounts import gib
from lisatune.common.files import write_whole
from lisatune.engine import LisaEngine
from lisatune.memory.measure import PeakMeter, state_bytes, tensor_bytes
from lisatune.optim.suited import each_of
from lisatune.processes.tensors import local
from lisatune.slices.engine import SliceEngine

# tensors of a parameter's size that an optimizer of PyTorch keeps
MOMENTS = {"Adam": 2, "AdamW": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "Adagrad": 1, "Lion": 1}


class Record:
    """Bytes of this process from the beginning to the end of a training.

    Args:
        engine: LISA, before its first step.
        optimizer: The Trainer's.
    """

    def __init__(self, engine: LisaEngine | SliceEngine, optimizer: Any) -> None:
        self.engine = engine
        weights = tensor_bytes(engine.layers.model.parameters())
        self.meter = PeakMeter(next(engine.layers.model.parameters()).device, own_bytes=weights)
        self.most_state_bytes = self.predicted_bytes = 0
        self.expected = f"weights {gib(weights)}, gradients {gib(self._most_trained_bytes())} at most"
        moments = MOMENTS.get(type(each_of(optimizer)[0]).__name__)
        if moments and not any(
            g.get("factored") or g.get("stateless") for one in each_of(optimizer) for g in one.param_groups
        ):
            state = moments * self._most_trained_bytes()
            self.expected += f", optimizer state {gib(state)} (full training: {gib(moments * weights)})"

    def _most_trained_bytes(self) -> int:
        """What trains always, and the largest draw there can be."""
        sizes = {
            part: sum(local(p).numel() * p.element_size() for p in own.values())
            for part, own in self.engine.layers.parts().items()
        }
        if isinstance(self.engine, SliceEngine):
            size = next(self.engine.layers.model.parameters()).element_size()
            return self.engine.num_trainable() * size
        always = sum(sizes[part] for part in self.engine.trained_parts(()))
        drawn = sorted((sizes[part] for part in self.engine.pool), reverse=True)
        return always + sum(drawn[: len(self.engine.sampler(0))])

    def step_is_done(self, optimizer: Any) -> None:
        """Look at what the optimizer holds."""
        self.most_state_bytes = max(self.most_state_bytes, sum(state_bytes(one) for one in each_of(optimizer)))

    def measured(self) -> str:
        """The peak, in words."""
        where = "on the device" if self.meter.device.type == "cuda" else "in memory, without what was there before"
        peak = self.meter.bytes() - self.meter.base_bytes
        where += f" (predicted {gib(self.predicted_bytes)} of tensors)" if self.predicted_bytes else ""
        return f"peak {gib(peak)} {where}; optimizer state {gib(self.most_state_bytes)} at most"


def write_report(path: Path, title: str, told: Sequence[str], engine: Any, history: Sequence[dict[str, Any]]) -> None:
    """A page of the Trainer's log: losses, and which layers trained; needs matplotlib.

    Args:
        path: Of the page.
        title: Its heading.
        told: Sentences above the curves.
        engine: LISA.
        history: The Trainer's ``log_history``.
    """
    from lisatune.pages.html import html_page, html_table
    from lisatune.pages.plots import active_layers, loss_curve

    body = [html_table(["", ""], [["LISA", line] for line in told])]
    if any("loss" in row for row in history):
        body += ["<h2>Loss</h2>", loss_curve(history)]
    if isinstance(engine, LisaEngine):
        last = max((row["step"] for row in history), default=0)
        active = [{"step": step, "active_layers": engine.active_at(step)} for step in range(last)]
        body += ["<h2>Layers in training</h2>", active_layers(active)]
    numbers = sorted({name for row in history for name, value in row.items() if isinstance(value, int | float)})
    rows = [[f"{row[name]:.4g}" if name in row else "" for name in numbers] for row in history]
    body += ["<h2>The Trainer's log</h2>", html_table(numbers, rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, html_page(title, body, wide=True))
