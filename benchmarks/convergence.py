"""Does LISA converge as its theorem says: on convex problems whose optimum is known, and on a small model.

python benchmarks/convergence.py convex [--seeds 5] [--steps 1000000] [--full-batch-steps 100000] [--limit-steps 100000]
python benchmarks/convergence.py slices [--seeds 5] [--steps 100000] [--limit-steps 100000]
python benchmarks/convergence.py model [--seeds 3] [--steps 1000]

Theorem 1 of arXiv:2403.17919: f convex and smooth, a bounded set, bounded stochastic gradients, then

    1/T * sum over t = 1..T of f_reg(w_t)  -  min f_reg   <=   O(1 / sqrt(T))

It bounds the mean of f over the iterates, not f at their mean (which is lower, f being convex), nor at the last.
The text names no step size; that of the proofs it stands on is eta_t = eta_0 / sqrt(t), so that one run gives every T.

``convex`` runs logistic regression in blocks: 8 layers, of which 2 are drawn, and one block that trains always, as
embedding and head do. ``run`` is the engine's arithmetic for hundreds of runs at once; ``engine_run`` is LisaEngine and
torch.optim.AdamW themselves, one run at a time, and a test holds the two together. ``slices`` is the same problem with
every block cut into slices, of which one each trains, by ``SliceEngine``. ``model`` uses the engine itself.
Shapes: S seeds (problem, minibatches and draws of its own), V variants, M blocks, D width, B rows.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import io
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from results import SHARED, markdown, write_page
from torch import Tensor, nn

from lisatune.compare import results
from lisatune.engine import LisaEngine, StatePolicy
from lisatune.layers import Layers, find_layers
from lisatune.samplers.draws import hashed
from lisatune.samplers.sweep import SweepSampler
from lisatune.samplers.uniform import UniformSampler
from lisatune.slices.engine import SliceEngine

NUM_LAYERS, NUM_ACTIVE, WIDTH, ROWS, RIDGE = 8, 2, 6, 512, 1e-2
BETAS, EPS = (0.9, 0.999), 1e-8  # of torch, and of LISA's code
INTERVALS, BATCH, BATCHES = (1, 5, 20, 100), 16, (1, 4, 16, 64, 256)
RATES, FULL_BATCH_RATES = (0.01, 0.03, 0.1, 0.3), (0.03, 0.1, 0.3, 1.0)
POLICIES: dict[StatePolicy, str] = {"keep": "kept", "reset_layers": "dropped", "reset_all": "all reset"}
MODEL_INTERVALS, MODEL_RATES, MODEL_BATCH, WINDOW, NUM_WINDOWS = (1, 20, 100), (1e-3, 3e-3, 1e-2), 4, 64, 256
HUES = {1: "#3b82f6", 5: "#10b981", 20: "#f97316", 100: "#a855f7"}  # of K
GREY = "#7d828a"  # legible on white and on black; the page's own colour does not reach into an image


@dataclass(frozen=True)
class Variant:
    """One way to train; ``corrected`` multiplies the updates of drawn layers by 1/p = N_L / gamma.

    With ``num_slices`` every block, the one that trains always too, is cut into so many; one slice of each trains.
    """

    interval_steps: int = 1
    state_policy: StatePolicy = "keep"
    corrected: bool = False
    rate: float = 0.1
    num_active: int = NUM_ACTIVE
    weight_decay: float = 0.0
    num_slices: int = 0

    @property
    def draws(self) -> tuple[int, int, int]:
        """What decides which weights train when."""
        return self.interval_steps, self.num_active, self.num_slices

    def scale(self, num_layers: int) -> float:
        """What a drawn layer's learning rate is multiplied by."""
        return num_layers / self.num_active if self.corrected else 1.0

    def cells(self) -> list[str]:
        """K, state and 1/p, for a table."""
        if self.interval_steps == FULL.interval_steps:
            return ["full Adam", "", ""]
        if self.num_slices:
            return [str(self.interval_steps), POLICIES[self.state_policy], f"slices, 1 of {self.num_slices}"]
        return [str(self.interval_steps), POLICIES[self.state_policy], "with" if self.corrected else ""]


FULL = Variant(10**9, num_active=NUM_LAYERS)
KINDS = [FULL, *(Variant(k, policy) for k in INTERVALS for policy in POLICIES)]
FEW_KINDS = [v for v in KINDS if v.interval_steps in (1, 20, FULL.interval_steps)]
ALL_KINDS = [FULL, *(replace(v, corrected=c) for v in KINDS[1:] for c in (False, True))]


# The problem


@dataclass(frozen=True)
class Problems:
    """Regularised logistic regression, one problem a seed: ``features`` (S, n, M * D), ``labels`` (S, n) of 0 and 1.

    f(w) = mean of log(1 + exp(z)) - y z + ridge / 2 * |w|**2, z = features @ w: convex, smooth, one minimum.
    """

    features: Tensor
    labels: Tensor
    ridge: float = RIDGE

    def loss(self, w: Tensor) -> Tensor:
        """f of each run, shape (S, V), for w of shape (S, V, M, D)."""
        w = w.flatten(2)
        z = w @ self.features.mT
        softplus = F.softplus(z, threshold=40)  # beyond 20, the default, torch leaves out 2e-9
        return (softplus - z * self.labels[:, None]).mean(-1) + self.ridge / 2 * w.square().sum(-1)

    def gradient(self, w: Tensor, rows: Tensor | None = None) -> Tensor:
        """Gradient at w (S, V, M, D) over ``rows`` (S, B) of each problem; of all by default."""
        x, y = self.features, self.labels
        if rows is not None:
            seeds = torch.arange(len(x))[:, None]
            x, y = x[seeds, rows], y[seeds, rows]
        flat = w.flatten(2)
        residual = torch.sigmoid(flat @ x.mT) - y[:, None]
        return (residual @ x / x.shape[1] + self.ridge * flat).view_as(w)

    def optimum(self) -> Tensor:
        """The minimum, (S, 1, M, D), by Newton's method from zero: quadratic, so 20 steps are more than enough."""
        x, w = self.features, torch.zeros_like(self.features[:, 0])
        for _ in range(20):
            p = torch.sigmoid(x @ w[:, :, None])
            hessian = (p * (1 - p) * x).mT @ x / x.shape[1] + self.ridge * torch.eye(x.shape[2], dtype=x.dtype)
            w = w - torch.linalg.solve(hessian, self.gradient(w[:, None, None])[:, 0, 0])
        return w.view(len(x), 1, -1, WIDTH)

    def gap(self, w: Tensor) -> Tensor:
        """f less its minimum."""
        return self.loss(w) - self.loss(self.optimum())


def make_problems(num_seeds: int) -> Problems:
    """Correlated features of scales 0.3 to 3, of which one that trains always is constant; a third of labels are 1."""
    features, labels, width = [], [], (NUM_LAYERS + 1) * WIDTH
    for seed in range(num_seeds):
        draws: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "dtype": torch.float64}
        mix = 0.6 / width**0.5 * torch.randn(width, width, **draws) + 0.8 * torch.eye(width, dtype=torch.float64)
        x = torch.randn(ROWS, width, **draws) @ mix
        x *= torch.logspace(-0.5, 0.5, width, dtype=torch.float64)[torch.rand(width, **draws).argsort()]
        x[:, 0] = 1
        z = x @ torch.randn(width, **draws) / 3 - 1.5
        features.append(x)
        labels.append((torch.rand(ROWS, **draws) < torch.sigmoid(z)).double())
    return Problems(torch.stack(features), torch.stack(labels))


def minibatches(seed: int, batch_rows: int, num_rows: int) -> Iterator[Tensor]:
    """Rows of each step, with replacement, (batch_rows,); the same for every variant."""
    generator = torch.Generator().manual_seed(10**6 + seed)
    while True:
        yield from torch.randint(num_rows, (1000, batch_rows), generator=generator)


# Training: many runs at once, and the engine itself


class BlockAdam:
    """AdamW on the drawn blocks of many runs, with state kept, dropped or reset as ``LisaEngine`` does.

    Block 0 trains always, block i + 1 is layer i; of slices each block has its own. State is (S, V, M, D), with a step
    counter a weight, where torch keeps one a parameter. ``variants`` of one (K, gamma, slices) must stand side by side.
    """

    def __init__(self, variants: Sequence[Variant], seeds: Sequence[int], num_layers: int, width: int) -> None:
        shape = len(seeds), len(variants), num_layers + 1, width
        self.m, self.v, self.active, self.count = torch.zeros(4, *shape, dtype=torch.float64)
        keys = [v.draws for v in variants]
        self.spans = {key: slice(keys.index(key), keys.index(key) + keys.count(key)) for key in keys}
        assert all(set(keys[span]) == {key} for key, span in self.spans.items()), "variants are not in order"
        self.drawn = [{key: drawer(key, seed, num_layers, width) for key in self.spans} for seed in seeds]
        self.rate = _column(v.rate for v in variants).repeat(1, num_layers + 1, 1)
        self.rate[:, 1:] *= _column(v.scale(num_layers) for v in variants)
        self.decay = _column(v.weight_decay for v in variants)
        self.kept = _column(v.state_policy == "keep" for v in variants)
        self.dropped = _column(v.state_policy == "reset_layers" for v in variants)

    def begin_step(self, step: int) -> None:
        """Draw the blocks of ``step``, from 0, and see to the state of those that freeze."""
        for key, span in self.spans.items():
            if step % key[0]:
                continue
            active = torch.stack([drawn[key](step // key[0]) for drawn in self.drawn])[:, None]
            self.active[:, span] = active
            survives = self.kept[span] + self.dropped[span] * active  # of reset_all nothing does
            for state in (self.m, self.v, self.count):
                state[:, span] *= survives

    def step(self, w: Tensor, gradient: Tensor, factor: float) -> None:
        """Update the active blocks of ``w`` in place, at learning rate ``rate * factor``."""
        beta1, beta2 = BETAS
        rate = self.active * self.rate * factor
        self.count += self.active
        self.m += (gradient - self.m) * (self.active * (1 - beta1))
        self.v += (gradient * gradient - self.v) * (self.active * (1 - beta2))
        t = self.count.clamp(min=1)  # 0 only where nothing is active
        if self.decay.any():
            w *= 1 - rate * self.decay
        w -= self.m / (self.v / (1 - beta2**t)).sqrt_().add_(EPS) * (rate / (1 - beta1**t))


def drawer(draws: tuple[int, int, int], seed: int, num_layers: int, width: int) -> Callable[[int], Tensor]:
    """Which weights train: number of the interval to (M, D) of ones and zeros, by the package's samplers."""
    _, num_active, num_slices = draws
    uniform = UniformSampler(num_layers, num_active, seed)
    sweeps = [SweepSampler(num_slices or 1, 1, hashed(seed, 0, block)) for block in range(num_layers + 1)]

    def draw(interval: int) -> Tensor:
        active = torch.zeros(num_layers + 1, width, dtype=torch.float64)
        if num_slices:
            for row, sweep in zip(active, sweeps, strict=True):
                (piece,) = sweep(interval)
                row[width * piece // num_slices : width * (piece + 1) // num_slices] = 1
        else:
            active[[0, *(layer + 1 for layer in uniform(interval))]] = 1
        return active

    return draw


def _column(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)[:, None, None]


@dataclass(frozen=True)
class Record:
    """What runs leave: gaps are f - min f, (S, V), at each of ``times``; ``tail`` holds mean points, (S, V, M, D)."""

    times: list[int]
    mean_gap: list[Tensor]  # of f over the iterates so far: what the theorem bounds
    gap: list[Tensor]
    gap_of_mean: list[Tensor]
    tail: dict[int, Tensor]  # T, a power of ten -> the mean of w_t over T/2 < t <= T
    farthest: Tensor  # max over t of |w_t - w*| in the max norm


def run(
    problems: Problems,
    variants: Sequence[Variant],
    steps: int,
    *,
    batch_rows: int | None = None,
    start: Tensor | None = None,
    constant: bool = False,
) -> Record:
    """Train every variant on every problem; ``batch_rows`` None takes full gradients, ``constant`` keeps eta as it is.

    w_1 is ``start``, zero by default, and w_t is where step t takes its gradient. f is evaluated at every step at
    first, then at 300 steps a decade with straight lines between.
    """
    seeds = range(len(problems.labels))
    adam = BlockAdam(variants, seeds, NUM_LAYERS, WIDTH)
    w = torch.zeros_like(adam.m) if start is None else start.expand_as(adam.m).clone()
    best, draws = problems.optimum(), [minibatches(seed, batch_rows or 1, problems.labels.shape[1]) for seed in seeds]
    lowest = problems.loss(best)
    record = Record([], [], [], [], {}, torch.zeros(w.shape[:2], dtype=w.dtype))
    evaluated, reported, before = set(log_spaced(steps, 300)), set(log_spaced(steps, 10)), 0
    total, halves, gap, sum_gap = torch.zeros_like(w), {}, 0.0, torch.zeros_like(record.farthest)
    for t in range(1, steps + 1):
        total += w
        if t in evaluated:
            previous, gap, lapse = gap, problems.loss(w) - lowest, t - before
            sum_gap, before = sum_gap + gap * (lapse + 1) / 2 + previous * (lapse - 1) / 2, t
            torch.maximum(record.farthest, (w - best).flatten(2).abs().amax(-1), out=record.farthest)
        if t in reported:
            record.times.append(t)
            record.mean_gap.append(sum_gap / t)
            record.gap.append(gap)
            record.gap_of_mean.append(problems.loss(total / t) - lowest)
        if is_power_of_ten(2 * t):
            halves[2 * t] = total.clone()
        if t in halves:
            record.tail[t] = (total - halves.pop(t)) / (t // 2)
        adam.begin_step(t - 1)
        rows = None if batch_rows is None else torch.stack([next(draw) for draw in draws])
        adam.step(w, problems.gradient(w, rows), 1.0 if constant else t**-0.5)
    return record


class Additive(nn.Module):
    """The same problem as a module of parts: the logit is a sum over embedding and decoder layers.

    Each weight is a row of its matrix, since slices are made of rows.
    """

    def __init__(self) -> None:
        super().__init__()
        parts = [nn.Linear(1, WIDTH, bias=False, dtype=torch.float64) for _ in range(NUM_LAYERS + 1)]
        self.embedding, self.decoder = parts[0], nn.ModuleList(parts[1:])

    def blocks(self) -> Tensor:
        """All weights, (M, D), as the layers give them: a slice learns by what its layer computes."""
        one = torch.ones(1, dtype=torch.float64)
        return torch.stack([layer(one) for layer in (self.embedding, *self.decoder)])

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.blocks().flatten()


def engine_and_groups(
    layers: Layers, variant: Variant, seed: int
) -> tuple[LisaEngine | SliceEngine, list[dict[str, Any]]]:
    """An engine for ``variant``, and its optimizer's groups: ``scale`` is what multiplies the learning rate."""
    n = len(layers.decoder)
    how = variant.interval_steps, variant.state_policy
    engine: LisaEngine | SliceEngine = LisaEngine(layers, UniformSampler(n, variant.num_active, seed), *how)
    if variant.num_slices:
        engine = SliceEngine(layers, SweepSampler(variant.num_slices, 1, seed), *how)
    decoder, others = [], []
    for part, own in layers.parts().items():
        (decoder if part.startswith("layers.") else others).extend(own.values())
    return engine, [{"params": others, "scale": 1.0}, {"params": decoder, "scale": variant.scale(n)}]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group its learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def engine_run(problems: Problems, variant: Variant, steps: int, *, batch_rows: int | None = None) -> Tensor:
    """``run`` for the first problem, by the engine and torch's AdamW: w after each step, (steps, M, D)."""
    x, y = problems.features[0], problems.labels[0]
    model = Additive()
    nn.utils.vector_to_parameters(torch.zeros_like(x[0]), model.parameters())
    layers = Layers(model, model, model.embedding, tuple(model.decoder), "decoder", None, (), ())
    engine, groups = engine_and_groups(layers, variant, seed=0)
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, weight_decay=variant.weight_decay)
    draw, path = minibatches(0, batch_rows or 1, len(y)), []
    for step in range(steps):
        set_rate(optimizer, variant.rate / math.sqrt(step + 1))
        engine.begin_step(step, optimizer)
        rows = slice(None) if batch_rows is None else next(draw)
        ridge = problems.ridge / 2 * model.blocks().square().sum()
        (F.binary_cross_entropy_with_logits(model(x[rows]), y[rows]) + ridge).backward()
        optimizer.step()
        optimizer.zero_grad()
        path.append(model.blocks().detach().clone())
    return torch.stack(path)


# Measuring and telling


def log_spaced(last: int, per_decade: int) -> list[int]:
    """Distinct whole numbers from 1 to ``last``, near ``per_decade`` a decade; powers of ten and ``last`` too."""
    points = {round(10 ** (i / per_decade)) for i in range(int(per_decade * math.log10(last)) + 1)}
    return sorted(points | {last})


def is_power_of_ten(number: int) -> bool:
    """1, 10, 100 and so on."""
    return 10 ** (len(str(number)) - 1) == number


def fit_slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Least-squares slope of log(values) against log(times): -0.5 where values fall as 1 / sqrt(T)."""
    return statistics.linear_regression([math.log(t) for t in times], [math.log(v) for v in values]).slope


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """Mean of the seeds and half the width of its 95% confidence interval (Student's t)."""
    found = results.interval(list(samples))
    return found["mean"], found["high"] - found["mean"]


def slope_of(times: Sequence[int], values: Sequence[Tensor], variant: int, since: float) -> tuple[float, float]:
    """Slope over times from ``since`` on of ``values``, (S, V) each: a fit for each seed, then ``interval``."""
    kept = [i for i, t in enumerate(times) if t >= since]
    seeds = torch.stack([values[i][:, variant] for i in kept], 1).tolist()
    return interval([fit_slope([times[i] for i in kept], own) for own in seeds])


def few(value: float) -> str:
    """Two digits."""
    return f"{value:.1e}"


def best_rates(record: Record, variants: Sequence[Variant]) -> dict[Variant, int]:
    """Index of each variant's best rate by the theorem's quantity at the end; the key has the default rate."""
    best: dict[Variant, int] = {}
    final = record.mean_gap[-1].mean(0)
    for i, variant in enumerate(variants):
        key = replace(variant, rate=Variant.rate)
        if key not in best or final[i] < final[best[key]]:
            best[key] = i
    return best


def rate_table(problems: Problems, record: Record, variants: Sequence[Variant]) -> str:
    """Every variant at its best rate: the theorem's quantity at each decade, its slopes, and what lies at the end."""
    steps, decades = record.times[-1], [t for t in record.times if t >= 100 and is_power_of_ten(t)]
    tails = {t: problems.gap(record.tail[t]).mean(0) for t in sorted(record.tail)[-2:]}
    top = max(v.rate for v in variants)
    rows = []
    for key, i in best_rates(record, variants).items():
        slopes = [(i, steps / 1000), (i, steps / 10), (variants.index(replace(variants[i], rate=top)), steps / 10)]
        rows.append([
            *key.cells(), f"{variants[i].rate:g}",
            *(few(record.mean_gap[record.times.index(t)][:, i].mean()) for t in decades),
            *("{:.2f} ± {:.2f}".format(*slope_of(record.times, record.mean_gap, j, since)) for j, since in slopes),
            few(record.gap[-1][:, i].mean()), few(record.gap_of_mean[-1][:, i].mean()),
            *(few(tail[i]) for tail in tails.values()),
        ])  # fmt: skip
    header = ["K", "state", "1/p", "eta_0", *(f"T = {t:.0e}" for t in decades), f"slope, T from {steps / 1000:.0e}"]
    header += ["slope, last decade", f"the same at eta_0 = {top:g}", "f(w_T)", "f(mean w_t)"]
    return markdown([*header, *(f"f(mean w_t, last half of {t:.0e})" for t in tails)], rows)


def limits(problems: Problems, steps: int, kinds: Sequence[Variant] = tuple(KINDS)) -> dict[int, Tensor]:
    """Where ``kinds`` go as eta falls, by rows of a minibatch: f - min f at the mean of the second half, (S, V).

    They start at the minimum: what moves them away is their own bias.
    """
    start = problems.optimum()
    return {
        rows: problems.gap(run(problems, kinds, steps, batch_rows=rows, start=start).tail[steps]) for rows in BATCHES
    }


def constant_rate_table(problems: Problems, steps: int) -> str:
    """Mean of f over the last nine tenths of a run at a rate that does not fall, started at the minimum."""
    rates, rows = (1e-2, 3e-3, 1e-3, 3e-4), []
    variants = [replace(kind, rate=rate) for kind in FEW_KINDS for rate in rates]
    for batch_rows in (BATCH, None):
        record = run(problems, variants, steps, batch_rows=batch_rows, start=problems.optimum(), constant=True)
        first = record.mean_gap[record.times.index(steps // 10)]
        floors = ((record.mean_gap[-1] - first / 10) / 0.9).mean(0).view(-1, len(rates)).tolist()
        for kind, own in zip(FEW_KINDS, floors, strict=True):
            rows.append([*kind.cells(), str(batch_rows or "all"), *map(few, own), f"{fit_slope(rates, own):.2f}"])
    return markdown(["K", "state", "1/p", "rows", *(f"eta = {r:g}" for r in rates), "the gap goes as eta to the"], rows)


def decay_table(problems: Problems, steps: int, weight_decay: float = 0.1) -> str:
    """Where AdamW's decay leads, and the S for which that is a minimum of f + 1/2 w'Sw: S_i = -gradient_i / w_i."""
    variants = [replace(v, weight_decay=weight_decay, rate=0.3) for v in FEW_KINDS]
    best, table_rows = problems.optimum(), []
    for batch_rows in (BATCH, None):
        w = run(problems, variants, steps, batch_rows=batch_rows, start=best).tail[steps]
        s, gaps, squares = -problems.gradient(w) / w, problems.gap(w).mean(0), torch.zeros_like(w)
        draws = [minibatches(seed, batch_rows or 1, ROWS) for seed in range(len(w))]
        for _ in range(500):
            rows = None if batch_rows is None else torch.stack([next(draw) for draw in draws])
            squares += problems.gradient(w, rows).square() / 500
        for i, v in enumerate(variants):
            big = w[:, i].abs() > 0.1  # the quotient of a small weight says nothing
            low, middle, high = s[:, i][big].quantile(torch.tensor([0.1, 0.5, 0.9], dtype=s.dtype)).tolist()
            expected = (s[:, i] / squares[:, i].sqrt() / weight_decay)[big].median().item()
            norms = (w[:, i].flatten(1).norm(dim=1) / best.flatten(1).norm(dim=1)).mean()
            row = [*v.cells(), str(batch_rows or "all"), few(gaps[i]), f"{norms:.2f}"]
            row += [f"{middle:.4f} ({low:.4f} to {high:.4f})", f"{expected:.2f}" if batch_rows else ""]
            table_rows.append(row)
    header = ["K", "state", "1/p", "rows", "f, less min f", "norm of w, against the minimum's"]
    header += ["S: median (tenth to nine tenths)", "S over weight_decay times the gradient's rms, median"]
    return markdown(header, table_rows)


Line = tuple[str, Sequence[float], Sequence[float], str, str]  # label, x, y, colour, line style


def publish(name: str, text: str, panels: Sequence[tuple[str, str, str, Sequence[Line]]]) -> None:
    """Write the page and, beside it, its figure: panels (title, names of x and y, lines) on logarithmic axes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from lisatune.pages.plots import INK, STYLE

    page = write_page(name, text, __doc__ or "")
    page.write_text(page.read_text(encoding="utf-8").replace("(FIGURE)", f"({page.stem}.svg)"), encoding="utf-8")
    with mpl.rc_context(STYLE | {"font.size": 9}):
        figure = Figure(figsize=(9, 3.4 * len(panels) / 2), layout="constrained")
        cells = figure.subplots(len(panels) // 2, 2, squeeze=False).flat
        for axes, (title, x_name, y_name, lines) in zip(cells, panels, strict=True):
            for label, x, y, colour, style in lines:
                axes.loglog(x, y, style, color=colour, label=label, linewidth=1.5, markersize=3)
            axes.set(title=title, xlabel=x_name, ylabel=y_name)
            axes.legend(fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    page.with_suffix(".svg").write_text(svg[svg.index("<svg") :].replace(INK, GREY), encoding="utf-8")
    print(page)


# The convex problem's page


def end_table(kinds: Sequence[Variant], ends: dict[int, Tensor]) -> str:
    """Where ``kinds`` end, by rows of a minibatch."""
    rows = [
        [*v.cells(), *("{:.1e} ± {:.0e}".format(*interval(ends[rows][:, i].tolist())) for rows in BATCHES)]
        for i, v in enumerate(kinds)
    ]
    return markdown(["K", "state", "1/p", *(f"B = {rows}" for rows in BATCHES)], rows)


def verdicts(noisy: Record, variants: Sequence[Variant], ends: dict[int, Tensor]) -> str:
    """Each claim, what was measured of it, and whether it holds; by the numbers of this run."""
    at, steps = best_rates(noisy, variants), noisy.times[-1]
    limit = dict(zip(KINDS, ends[BATCH].mean(0).tolist(), strict=True))

    def end(v: Variant) -> float:
        return noisy.mean_gap[-1][:, at[v]].mean().item()

    def slope(v: Variant) -> tuple[float, float]:
        return slope_of(noisy.times, noisy.mean_gap, at[v], steps / 10)

    def told(v: Variant) -> str:
        return "{:.2f} ± {:.2f}".format(*slope(v))

    def by_interval(numbers: Iterable[str]) -> str:
        return f"{', '.join(numbers)} for K = {', '.join(map(str, INTERVALS))}"

    kept = [Variant(k) for k in INTERVALS]
    holds = sum(slope(kept[0])) < -0.45
    rows = [(
        "1/sqrt(T) in the theorem's setting: K = 1, state kept, minibatches",
        f"slope of the last decade {told(kept[0])}, full Adam {told(FULL)}; both contain a start that fades as 1/T",
        "holds" if holds else "does not hold",
    )]  # fmt: skip
    ratios = [end(v) / end(kept[0]) for v in kept]
    same = max(limit[v] for v in kept) < 2 * limit[kept[0]] and all(sum(slope(v)) < -0.45 for v in kept)
    rows.append((
        "K > 1, state kept",
        f"slopes {by_interval(told(v) for v in kept)}; the quantity at the last T, against K = 1: "
        f"{', '.join(f'{r:.2f}' for r in ratios)}; where they end, 16 rows: {', '.join(few(limit[v]) for v in kept)}",
        "costs a constant at the start, neither rate nor limit" if same else "costs more than a constant",
    ))  # fmt: skip
    for policy in ("reset_layers", "reset_all"):
        lost = [replace(v, state_policy=policy) for v in kept]
        shares = [limit[a] / limit[b] for a, b in zip(lost, kept, strict=True)]
        rows.append((
            f"state {POLICIES[policy]}",
            f"slopes {by_interval(told(v) for v in lost)}; where they end, 16 rows, against kept: "
            + ", ".join(f"{share:.1f} times" for share in shares),
            "does not go to the minimum where K is small" if shares[0] > 2 else "goes to the minimum",
        ))  # fmt: skip
    pairs = [(replace(v, corrected=True), v) for v in KINDS[1:]]
    ratios = [end(a) / end(b) for a, b in pairs]
    rates = [variants[at[b]].rate / variants[at[a]].rate for a, b in pairs]
    rows.append((
        "the missing 1/p",
        f"with it, each at its best rate, the quantity at the last T is {min(ratios):.2f} to {max(ratios):.2f} times; "
        f"best eta_0 without over best with: {min(rates):.1f} to {max(rates):.1f} (1/p is {NUM_LAYERS // NUM_ACTIVE})",
        "changes the best rate, neither limit nor pace" if max(ratios) < 1.5 and min(ratios) > 0.67 else "matters",
    ))  # fmt: skip
    return markdown(["claim", "measured", "verdict"], rows)


def convex_panels(noisy: Record, smooth: Record, ends: dict[int, Tensor]) -> list[tuple[str, str, str, list[Line]]]:
    """Kept state, dropped state, all rows, and the limit by rows of a minibatch."""

    def line(record: Record, v: Variant, label: str, style: str = "-") -> Line:
        i = best_rates(record, tried(RATES if record is noisy else FULL_BATCH_RATES))[v]
        shown = {t: gap[:, i].mean().item() for t, gap in zip(record.times, record.mean_gap, strict=True) if t >= 10}
        return label, list(shown), list(shown.values()), HUES.get(v.interval_steps, GREY), style

    def guide(record: Record, first: float, power: float, label: str) -> Line:
        x = [10, record.times[-1]]
        return label, x, [first, first * (x[1] / x[0]) ** power], GREY, ":"

    def end(v: Variant, label: str, style: str) -> Line:
        own = [ends[rows].mean(0)[KINDS.index(v)].item() for rows in BATCHES]
        return label, BATCHES, own, HUES.get(v.interval_steps, GREY), style

    panels = []
    for title, policy in (
        ("minibatches of 16, state kept", "keep"),
        ("minibatches of 16, state dropped", "reset_layers"),
    ):
        lines = [line(noisy, Variant(k, policy), f"K = {k}") for k in INTERVALS]
        panels.append((title, [line(noisy, FULL, "full Adam"), *lines, guide(noisy, 0.1, -0.5, "1 / sqrt(T)")]))
    lines = [line(smooth, Variant(k, p), f"K = {k}, {name}", style) for k in (1, 100)
             for p, name, style in (("keep", "kept", "-"), ("reset_layers", "dropped", "--"))]  # fmt: skip
    panels.append(("all rows", [line(smooth, FULL, "full Adam"), *lines, guide(smooth, 0.06, -1, "1 / T")]))
    lines = [end(Variant(k, "reset_layers"), f"K = {k}, dropped", "o--") for k in INTERVALS]
    last = [end(FULL, "full Adam", "o-"), end(Variant(), "K = 1, kept", "o-"), *lines]
    return [(title, "T", "mean of f over T iterates, less min f", own) for title, own in panels] + [
        ("where it ends as the rate falls", "rows in a minibatch", "f there, less min f", last)
    ]


def tried(rates: Sequence[float]) -> list[Variant]:
    """Every variant at every rate."""
    return [replace(v, rate=rate) for v in ALL_KINDS for rate in rates]


def convex(options: argparse.Namespace) -> None:
    """The page on the convex problem."""
    begin, problems, variants = time.perf_counter(), make_problems(options.seeds), tried(RATES)
    best = problems.optimum()
    ends = limits(problems, options.limit_steps)
    constant, decay = (make(problems, options.limit_steps) for make in (constant_rate_table, decay_table))
    smooth = run(problems, tried(FULL_BATCH_RATES), options.full_batch_steps)
    noisy = run(problems, variants, options.steps, batch_rows=BATCH)
    about = ABOUT.format(
        seeds=options.seeds, first=problems.loss(torch.zeros_like(best)).mean(), lowest=problems.loss(best).mean(),
        slack=problems.gradient(best).abs().max(), far=max(noisy.farthest.max(), smooth.farthest.max()),
    )  # fmt: skip
    text = f"""{about}

## Verdicts
{verdicts(noisy, variants, ends)}

{REASONS}

![The theorem's quantity against T, and where each variant ends](FIGURE)

## Minibatches of {BATCH}: 1/T times the sum of f(w_t), less min f
{rate_table(problems, noisy, variants)}

## The same with all rows in every step
{rate_table(problems, smooth, tried(FULL_BATCH_RATES))}

## Where it ends: f at the mean of the second half of {options.limit_steps:.0e} steps from the minimum
{end_table(KINDS, ends)}

## A rate that does not fall: mean of f(w_t), last nine tenths of {options.limit_steps:.0e} steps from the minimum
{constant}

## AdamW with weight_decay 0.1: what f_reg is
{decay}

Took {(time.perf_counter() - begin) / 60:.0f} minutes on one core that other work shared."""
    publish("convergence-convex", text, convex_panels(noisy, smooth, ends))


ABOUT = """\
Logistic regression, {seeds} problems of 512 rows and 54 weights: 8 layers of 6, 2 drawn (p = 1/4), and 6 weights that
train always. float64, betas 0.9 and 0.999, eps 1e-8; f_reg is f with a ridge of 0.01, weight_decay 0. Newton's method
finds min f to a gradient of {slack:.0e}; f(0) is {first:.3f}, min f {lowest:.3f}, in the mean. eta_t = eta_0 /
sqrt(t), eta_0 for each variant the best at the last T. A seed is a problem, its minibatches (the same for all
variants) and its draws by `UniformSampler`. The engine's arithmetic is vectorised; a test holds it to `LisaEngine`
with `torch.optim.AdamW`. "kept" is `state_policy=keep`, "dropped" `reset_layers` (the default), "all reset"
`reset_all`; 1/p "with" multiplies the updates of drawn layers by 4. Gaps are means over seeds; slopes are of log
against log, fitted for each seed; ± is half a 95% confidence interval over seeds.

The theorem asks for f convex and smooth: it is. For a bounded set: not enforced, but no weight went further than
{far:.1f} from the minimum's. For bounded stochastic gradients: so, where weights are bounded. It says nothing of K,
of what happens to state, of 1/p, and of betas, though with fixed betas Adam itself need not converge (Reddi et al.,
2018)."""

REASONS = """\
**Why 1/sqrt(T).** Minibatches keep the iterate at a distance where f(w_t) - min f is about 1.2 eta_t (last table but
one: the gap goes as eta). The mean of eta_0 / sqrt(t) is 2 eta_0 / sqrt(T): the rate is reached, not only bounded.
The start adds a share that falls as 1/T, so slopes lie between -0.5 and -1. With all rows only the start is left, and
the bound is loose: 1/T.

**Why K costs little.** Layers wait for their turn about K N_L / gamma steps, so the start takes longer. Later the
rate is so small that it no longer matters in which order blocks move.

**Why 1/p is not missed.** Adam's update is the same for a gradient times any constant: 1/p on the gradient does
nothing, and on the update it is a higher learning rate of the drawn layers. It multiplies a block's mean update by a
constant, and where that is zero, it stays zero.

**Why dropped state is missed.** Adam begun anew moves by g / |g|, the sign of one minibatch's gradient. Its mean is
zero where the gradient's median is zero, not its mean: the rare, large gradients of the rarer label lose their vote.
For some steps after a reset the denominator is still made of the few gradients in the numerator. So the bias falls
with K and with the rows of a minibatch, but neither with eta nor with T. Kept moments are of a thousand gradients,
and where they lead still nears the minimum as T grows. With all rows there is no noise to be biased by: the iterate
swings by eta about the minimum, a gap that goes as eta squared."""

# The page on slices

SLICED = [Variant(k, policy, num_slices=3) for k in INTERVALS for policy in ("keep", "reset_layers")]
SLICE_KINDS = [FULL, *(Variant(k, policy) for k in (1, 20) for policy in ("keep", "reset_layers")), *SLICED,
               Variant(1, "reset_all", num_slices=1)]  # fmt: skip


def slices(options: argparse.Namespace) -> None:
    """The same problem, where a third of every block trains at a time."""
    begin, problems = time.perf_counter(), make_problems(options.seeds)
    variants = [replace(v, rate=rate) for v in SLICE_KINDS for rate in RATES]
    ends = limits(problems, options.limit_steps, SLICE_KINDS)
    noisy = run(problems, variants, options.steps, batch_rows=BATCH)
    at = best_rates(noisy, variants)
    limit = dict(zip(SLICE_KINDS, ends[BATCH].mean(0).tolist(), strict=True))
    end = {v: noisy.mean_gap[-1][:, i].mean().item() for v, i in at.items()}
    rows = []
    for k in (1, 20):
        for policy in ("keep", "reset_layers"):
            ours, layers = Variant(k, policy, num_slices=3), Variant(k, policy)  # type: ignore[arg-type]
            rows.append(
                [str(k), POLICIES[policy], f"{end[ours] / end[layers]:.2f}", f"{limit[ours] / limit[layers]:.2f}"]
            )  # type: ignore[index]
    points = [t for t in noisy.times if t >= 10]

    def line(v: Variant, label: str, style: str = "-") -> Line:
        own = [gap[:, at[v]].mean().item() for t, gap in zip(noisy.times, noisy.mean_gap, strict=True) if t >= 10]
        return label, points, own, GREY if v == FULL else HUES[v.interval_steps], style

    def limit_line(v: Variant, label: str, style: str) -> Line:
        own = [ends[rows].mean(0)[SLICE_KINDS.index(v)].item() for rows in BATCHES]
        return label, BATCHES, own, GREY if v == FULL else HUES[v.interval_steps], style

    drawn = [(Variant(k, "reset_layers", num_slices=count), f"{name}, K = {k}, dropped", style)
             for k in (1, 20) for count, name, style in ((3, "slices", "-"), (0, "layers", "--"))]  # fmt: skip
    kept = [(Variant(1, num_slices=3), "slices, K = 1, kept", ":")]
    panels = [
        ("minibatches of 16", "T", "mean of f over T iterates, less min f",
         [line(FULL, "full Adam"), *(line(*own) for own in drawn + kept)]),
        ("where it ends as the rate falls", "rows in a minibatch", "f there, less min f",
         [limit_line(FULL, "full Adam", "-"), *(limit_line(*own) for own in drawn + kept)]),
    ]  # fmt: skip
    text = f"""{SLICES_ABOUT.format(seeds=options.seeds)}

![The theorem's quantity against T, and where each variant ends](FIGURE)

## Slices against layers: the same K and state, numbers of slices over those of layers
{markdown(["K", "state", "mean of f over T iterates, less min f, at the last T", "where it ends, 16 rows"], rows)}

## Minibatches of {BATCH}: 1/T times the sum of f(w_t), less min f
{rate_table(problems, noisy, variants)}

## Where it ends: f at the mean of the second half of {options.limit_steps:.0e} steps from the minimum
{end_table(SLICE_KINDS, ends)}

Took {(time.perf_counter() - begin) / 60:.0f} minutes on one core that other work shared."""
    publish("convergence-slices", text, panels)


SLICES_ABOUT = """\
The problem, the rates and the columns are those of [the convex page](2026-11-25-convergence-convex.md), with {seeds}
seeds. There are 9 blocks of 6 weights. "Layers": 2 of 8 blocks are drawn, and the ninth trains always, so a third of the
weights trains in a step. "Slices, 1 of 3": 2 of the 6 weights of every block train, each in its turn, so again a third.
"Slices, 1 of 1" trains all weights. With K = 1 and dropped state, or all reset, a step is the sign of the gradient. That is what
`lisatune train` does by default. The arithmetic is vectorised; a test holds it to `SliceEngine` with `torch.optim.AdamW`.

**What carries over from the theorem.** Its proof stands on randomised block-coordinate Adam, which gives every block the
same chance. Slices give every weight the same share: each trains once in S intervals. The paper's LISA does not, since
embedding and head train in every step. The theorem keeps the state of Adam. Rows with kept state are about it.

**What the sign step changes.** With state dropped at K = 1 the theorem does not apply. The step follows the sign of one
minibatch's gradient. Its mean is zero where the median of the gradient is zero, and that is not the minimum. How far off
it ends depends on the rows of a minibatch, and not on the rate. More rows, or K > 1 with state, bring it closer."""

# The model's page


def load_model_and_windows() -> tuple[nn.Module, Tensor]:
    """stories260K, and the first tokens of 256 TinyStories, (256, 65)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, stories = SHARED / "models/stories260K/hf", SHARED / "data/tinystories/tinystories_10k.txt.gz"
    for path in (folder, stories):
        if not path.exists():
            sys.exit(
                f"skipped: there is no shared/{path.relative_to(SHARED)} beside the checkout, which this part needs"
            )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = gzip.decompress(stories.read_bytes()).decode().split("<|endoftext|>")
    ids = ([tokenizer.bos_token_id, *tokenizer(text.strip(), add_special_tokens=False).input_ids] for text in texts)
    windows = [own[: WINDOW + 1] for own in ids if len(own) > WINDOW][:NUM_WINDOWS]
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train(), torch.tensor(windows)


def window_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean next-token cross-entropy."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def loss_and_sq_gradient(model: nn.Module, windows: Tensor) -> tuple[float, float]:
    """Loss over all windows, and the squared norm of its gradient by all weights, frozen ones too."""
    model = copy.deepcopy(model).requires_grad_(True)
    model.zero_grad()
    loss = 0.0
    for part in windows.split(64):
        share = window_loss(model, part) * (len(part) / len(windows))
        share.backward()
        loss += share.item()
    return loss, sum(p.grad.square().sum().item() for p in model.parameters())


def model_run(
    pretrained: nn.Module, windows: Tensor, variant: Variant, steps: int, seed: int, times: Sequence[int] = ()
) -> tuple[list[float], dict[int, tuple[float, float]]]:
    """Minibatch losses at w_1..w_T, and at each of ``times`` the loss and squared gradient norm over all windows.

    A minibatch is drawn after w_t is made: its loss at w_t is f(w_t) without bias, and their mean is the theorem's.
    """
    model = copy.deepcopy(pretrained)
    engine, groups = engine_and_groups(find_layers(model), variant, seed)
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, weight_decay=0.0)
    draw, losses, seen = minibatches(seed, MODEL_BATCH, len(windows)), [], {}
    for t in range(1, steps + 1):
        if t in times:
            seen[t] = loss_and_sq_gradient(model, windows)
        set_rate(optimizer, variant.rate / math.sqrt(t))
        engine.begin_step(t - 1, optimizer)
        loss = window_loss(model, windows[next(draw)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, seen


def model(options: argparse.Namespace) -> None:
    """The page on the small language model."""
    begin, steps = time.perf_counter(), options.steps
    pretrained, windows = load_model_and_windows()
    num_layers = len(find_layers(pretrained).decoder)
    kinds = [replace(FULL, num_active=num_layers)]
    kinds += [Variant(k, policy, num_active=1) for k in MODEL_INTERVALS for policy in POLICIES]
    kinds += [Variant(20, "reset_layers", True, num_active=1)]
    decades = [t for t in log_spaced(steps, 1) if t >= 10]
    first, _ = loss_and_sq_gradient(pretrained, windows)
    final = model_run(pretrained, windows, replace(kinds[0], rate=MODEL_RATES[0]), 3 * steps, 10**4, [3 * steps])
    lowest = final[1][3 * steps][0]
    rows, curves = [], {}
    for kind in kinds:
        tests = {
            rate: model_run(pretrained, windows, replace(kind, rate=rate), steps // 5, 0)[0] for rate in MODEL_RATES
        }
        best = replace(kind, rate=min(MODEL_RATES, key=lambda rate: sum(tests[rate])))
        runs = [model_run(pretrained, windows, best, steps, seed, decades) for seed in range(options.seeds)]
        means = torch.tensor([losses for losses, _ in runs], dtype=torch.float64).cumsum(1)
        means = means / torch.arange(1, steps + 1) - lowest
        curves[kind] = means.mean(0).tolist()
        points = [t for t in log_spaced(steps, 10) if t >= steps / 10]
        slope = slope_of(points, [means[:, t - 1, None] for t in points], 0, 0)
        row = [
            *kind.cells(),
            f"{best.rate:g}",
            *("{:.3f} ± {:.3f}".format(*interval(means[:, t - 1].tolist())) for t in decades),
        ]
        row += ["{:.2f} ± {:.2f}".format(*slope)]
        row += ["{:.3f} ± {:.3f}".format(*interval([seen[t][0] for _, seen in runs])) for t in decades]
        rows.append(row + [f"{statistics.mean(seen[t][1] for _, seen in runs):.2f}" for t in decades])
    header = ["K", "state", "1/p", "eta_0", *(f"T = {t}" for t in decades), "slope, last decade"]
    header += [f"{name} at w_{t}" for name in ("f", "sq. gradient") for t in decades]
    text = MODEL_ABOUT.format(seeds=options.seeds, first=first, lowest=lowest, long=3 * steps, tries=steps // 5)
    text += f"\n\n![Mean of f over T iterates](FIGURE)\n\n{markdown(header, rows)}\n\n"
    text += f"Took {(time.perf_counter() - begin) / 60:.0f} minutes on one core that other work shared."
    panels = []
    for policy, name in list(POLICIES.items())[:2]:
        shown = {
            v: own for v, own in curves.items() if v in (kinds[0], *(Variant(k, policy, num_active=1) for k in HUES))
        }
        points = [t for t in log_spaced(steps, 20) if t >= 5]
        lines = [
            ("full Adam" if v is kinds[0] else f"K = {v.interval_steps}", points, [own[t - 1] for t in points],
             HUES.get(v.interval_steps, GREY), "-") for v, own in shown.items()
        ]  # fmt: skip
        panels.append((f"state {name}", "T", "mean of f over T iterates, less the lowest f found", lines))
    publish("convergence-model", text, panels)


MODEL_ABOUT = """\
stories260K in float32: 5 decoder layers, 1 drawn (p = 1/5); the embedding, tied to the head, and the final norm train
always. f is the loss on the first 64 tokens of 256 TinyStories, {first:.3f} at the start; minibatches of 4.
`LisaEngine` and `torch.optim.AdamW` without decay; eta_t = eta_0 / sqrt(t), eta_0 the best of 0.001, 0.003 and 0.01
by the mean loss of {tries} steps of seed 0. {seeds} seeds of minibatches and draws; ± is half a 95% confidence
interval over them.

f is not convex: the theorem says nothing of it, and min f is not known. The columns T = are the theorem's quantity
with {lowest:.3f} for min f, the lowest that was found ({long} steps of full Adam); the mean of f is that of the
minibatch losses, each at the w_t that it had no part in. A squared gradient is of f by all weights, frozen ones too."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    for part, seeds, steps in ((convex, 5, 10**6), (slices, 5, 10**5), (model, 3, 10**3)):
        own = parts.add_parser(part.__name__)
        own.set_defaults(part=part)
        own.add_argument("--seeds", type=int, choices=range(2, 11), default=seeds)
        own.add_argument("--steps", type=int, default=steps, help="a power of ten")
        if part is convex:
            own.add_argument("--full-batch-steps", type=int, default=10**5, help="a power of ten")
        if part is not model:
            own.add_argument("--limit-steps", type=int, default=10**5, help="a power of ten")
    options = parser.parse_args()
    for key, value in vars(options).items():
        if key.endswith("steps") and not (value >= 100 and is_power_of_ten(value)):
            parser.error(f"--{key.replace('_', '-')} is {value}: give a power of ten, from 100")
    torch.set_num_threads(1)  # tensors this small gain nothing from more
    options.part(options)


if __name__ == "__main__":
    main()
