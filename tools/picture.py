"""Draw the README's picture: what trains in which step, and the memory of each method.

python tools/picture.py            # writes docs/assets/what-trains.svg; a minute, no GPU

The steps are those of the package's own samplers. The memory is forecast, by the same code as ``lisatune plan``.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lisatune.pages.plots import BLUE, GREEN, INK, ORANGE, PURPLE, STYLE
from lisatune.plan.forecast import model_config, plan_config, plan_run
from lisatune.samplers.draws import hashed
from lisatune.samplers.sweep import SweepSampler
from lisatune.samplers.uniform import UniformSampler

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs/assets/what-trains.svg"
SHAPE = ROOT / "benchmarks/shapes/llama-3.1-8b.json"
STEPS, NUM_LAYERS, NUM_SLICES = 40, 8, 15
PARTS = ("embedding", *(f"layer {i}" for i in range(NUM_LAYERS)), "head")
GREY = "#7d828a"  # legible on white and on black; the page's own colour does not reach into an image
BATCH = {"per_device_train_batch_size": 2, "max_length": 2048, "gradient_checkpointing": True}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "LISA, the paper's": {"recipe": "paper"},
    "LoRA r16": {"method": "lora"},
    "LISA in slices": {},
}
KINDS = {"weights": BLUE, "gradients": ORANGE, "state": PURPLE, "activations": GREEN}


def slices_by_step(axes: Axes) -> None:
    """One block of each part, another one in each step."""
    for number, _ in enumerate(PARTS):
        sampler = SweepSampler(NUM_SLICES, 1, hashed(0, 0, number))
        for step in range(STEPS):
            (block,) = sampler(step)
            axes.broken_barh([(step, 1)], (number + 0.06 + 0.88 * block / NUM_SLICES, 0.88 / NUM_SLICES), color=BLUE)


def layers_by_step(axes: Axes) -> None:
    """Embedding, head and two whole layers, other layers after 20 steps."""
    sampler = UniformSampler(NUM_LAYERS, 2, seed=1)
    for start in range(0, STEPS, 20):
        for number in (0, *(layer + 1 for layer in sampler(start // 20)), len(PARTS) - 1):
            axes.broken_barh([(start, 20)], (number + 0.06, 0.88), color=ORANGE)


def parts(axes: Axes, title: str) -> None:
    """Axes with one row for each part of the model."""
    for number in range(len(PARTS)):
        axes.broken_barh([(0, STEPS)], (number + 0.06, 0.88), facecolor="none", edgecolor=GREY, linewidth=0.4)
    axes.set(title=title, xlim=(0, STEPS), ylim=(len(PARTS), 0), xlabel="optimizer step", xticks=[0, 20, 40])
    axes.set_yticks([number + 0.5 for number in range(len(PARTS))], PARTS)
    axes.tick_params(left=False)
    axes.spines[["left", "bottom"]].set_visible(False)


def memory(axes: Axes) -> None:
    """Forecast peaks, by what is held."""
    shape = model_config(str(SHAPE))
    for place, settings in enumerate(METHODS.values()):
        plan, left = plan_run(plan_config(BATCH | settings, "cuda"), shape, "cuda"), 0.0
        sizes = {kind: plan.total(kind) / 2**30 for kind in KINDS}
        sizes["activations"] = plan.peak_bytes / 2**30 - sum(sizes.values()) + sizes["activations"]
        for kind, size in sizes.items():
            axes.barh(place, size, left=left, color=KINDS[kind], label=None if place else kind, height=0.6)
            left += size
        axes.text(left, place, f" {left:.0f}", va="center")
    axes.set_yticks(range(len(METHODS)), METHODS)
    axes.invert_yaxis()
    axes.set(title="Forecast peak, Llama-3.1-8B, 2 x 2048 tokens", xlabel="GiB")
    axes.tick_params(left=False)
    axes.legend(
        fontsize=9, loc="lower right", labels=["weights", "gradients", "optimizer state", "activations and the rest"]
    )


def main() -> None:
    with mpl.rc_context(STYLE | {"font.size": 10}):
        figure = Figure(figsize=(11, 6.4), layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=(1.5, 1))
        left, right, below = (figure.add_subplot(cell) for cell in (grid[0, 0], grid[0, 1], grid[1, :]))
        parts(left, "Slices (the default): a part of every matrix")
        slices_by_step(left)
        parts(right, "recipe=paper: two whole layers")
        layers_by_step(right)
        memory(below)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(text[text.index("<svg") :].replace(INK, GREY), encoding="utf-8")
    print(PICTURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
