"""The convergence benchmark's own arithmetic: what its figures stand on."""

import importlib.util
import math
import sys
from itertools import combinations

import pytest
import torch

from lisatune import find_layers
from places import CHECKOUT
from tiny import VOCABULARY, make_llama

BENCHMARKS = CHECKOUT / "benchmarks"


@pytest.fixture(scope="module")
def convergence():
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("convergence", BENCHMARKS / "convergence.py")
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, "convergence", module)  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    yield module
    patch.undo()


@pytest.fixture(scope="module")
def problems(convergence):
    return convergence.make_problems(num_seeds=2)


def test_the_optimum_has_no_gradient_and_is_the_least(convergence, problems):
    best = problems.optimum()
    assert problems.gradient(best).abs().max() < 1e-10
    around = best + 1e-3 * torch.randn(
        2, 50, 1, best.shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    assert (problems.loss(around) > problems.loss(best)).all()


def test_the_gradient_is_that_of_the_loss(problems):
    w = torch.randn(2, 3, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (expected,) = torch.autograd.grad(problems.loss(w).sum(), w)
    assert torch.allclose(problems.gradient(w.detach()), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("policy", ["keep", "reset_layers", "reset_all"])
@pytest.mark.parametrize("batch_rows", [16, None])
def test_many_runs_at_once_equal_the_engine(convergence, problems, policy, batch_rows):
    variants = [
        convergence.Variant(k, policy, corrected, weight_decay=0.1) for k in (1, 3, 20) for corrected in (False, True)
    ] + [convergence.Variant(k, policy, num_slices=count, weight_decay=0.1) for k in (1, 3) for count in (1, 3)]
    steps, seen = 60, []
    step = convergence.BlockAdam.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            convergence.BlockAdam, "step", lambda self, w, *rest: (step(self, w, *rest), seen.append(w[0].clone()))
        )
        convergence.run(problems, variants, steps, batch_rows=batch_rows)
    path = torch.stack(seen, 1)  # (V, steps, M, D)
    for ours, variant in zip(path, variants, strict=True):
        theirs = convergence.engine_run(problems, variant, steps, batch_rows=batch_rows)
        assert theirs.abs().max() > 0.1
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-9)  # rounding of the gradients, 1e-17 or so, over root v


@pytest.mark.parametrize("policy", ["keep", "reset_layers", "reset_all"])
def test_block_adam_equals_the_engine_on_a_llama(convergence, policy):
    model = make_llama(layers=4).double()
    layers = find_layers(model)
    variant = convergence.Variant(2, policy, corrected=True, rate=1e-2, num_active=1, weight_decay=0.1)
    engine, groups = convergence.engine_and_groups(layers, variant, seed=3)
    optimizer = torch.optim.AdamW(groups, betas=convergence.BETAS, eps=convergence.EPS, weight_decay=0.1)
    parts = layers.parts()
    always = [p for part, own in parts.items() if not part.startswith("layers.") for p in own.values()]
    blocks = [always, *(list(parts[f"layers.{i}"].values()) for i in range(4))]

    def flat(tensors):  # short blocks are filled up with zeros, whose gradient is zero
        return torch.nn.utils.rnn.pad_sequence(
            [torch.cat([t.flatten() for t in own]) for own in tensors], batch_first=True
        )

    w = flat([[p.detach() for p in own] for own in blocks])[None, None].clone()
    adam = convergence.BlockAdam([variant], [3], num_layers=4, width=w.shape[-1])
    for step in range(9):
        ids = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(step))
        model.requires_grad_(True)  # the whole gradient, for the blocks that the engine will freeze to be seen to stay
        model(input_ids=ids, labels=ids).loss.backward()
        adam.begin_step(step)
        adam.step(w, flat([[p.grad for p in own] for own in blocks])[None, None], (step + 1) ** -0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * group["scale"] / math.sqrt(step + 1)
        frozen = {p for i, own in enumerate(blocks[1:]) if i not in engine.active_at(step) for p in own}
        engine.begin_step(step, optimizer)
        for p in frozen:
            p.grad = None
        optimizer.step()
        optimizer.zero_grad()
        assert torch.allclose(flat([[p.detach() for p in own] for own in blocks]), w[0, 0], rtol=0, atol=1e-9)


def test_the_correction_makes_the_mean_over_all_draws_the_full_step(convergence):
    gradient = torch.randn(1, 1, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def moved(variant, drawn):
        adam = convergence.BlockAdam([variant], [0], num_layers=4, width=3)
        adam.active[:] = 0
        adam.active[:, :, [0, *(layer + 1 for layer in drawn)]] = 1
        w = torch.zeros_like(gradient)
        adam.step(w, gradient, 1.0)
        return w

    full = moved(convergence.Variant(num_active=4), range(4))
    draws = list(combinations(range(4), 2))
    mean = sum(moved(convergence.Variant(corrected=True), drawn) for drawn in draws) / len(draws)
    assert torch.allclose(mean, full, rtol=0, atol=1e-15)
    without = sum(moved(convergence.Variant(), drawn) for drawn in draws) / len(draws)
    assert torch.allclose(without[:, :, 1:], full[:, :, 1:] / 2, rtol=0, atol=1e-15)  # p = 2 of 4
    assert torch.equal(moved(convergence.Variant(), (1, 3))[:, :, 0], full[:, :, 0])  # what trains always


def test_to_scale_the_gradients_by_one_over_p_does_next_to_nothing(convergence):
    gradient = torch.randn(1, 1, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = []
    for scale in (1, 4):
        adam, w = convergence.BlockAdam([convergence.Variant()], [0], num_layers=4, width=3), torch.zeros_like(gradient)
        for step in range(20):
            adam.begin_step(step)
            adam.step(w, scale * (gradient - w), 1.0 if step else 0.5)
        moved.append(w)
    assert moved[0].abs().min() > 0
    assert torch.allclose(*moved, rtol=0, atol=1e-6)  # what eps = 1e-8 leaves


def test_with_one_step_and_nothing_kept_adam_is_the_sign_of_the_gradient(convergence, problems):
    variant = convergence.Variant(1, "reset_all", rate=0.25)
    adam = convergence.BlockAdam([variant], [0, 1], num_layers=8, width=6)
    w = torch.zeros(2, 1, 9, 6, dtype=torch.float64)
    for step in range(5):
        gradient, before = problems.gradient(w), w.clone()
        adam.begin_step(step)
        adam.step(w, gradient, 1.0)
        sign = gradient / (gradient.abs() + convergence.EPS)
        assert torch.allclose(before - w, 0.25 * adam.active * sign, rtol=0, atol=1e-14)


def test_slope_of_a_power_law_is_its_exponent_and_its_interval_covers_it(convergence):
    times = convergence.log_spaced(10**5, 10)
    assert {1, 10, 100, 10**3, 10**4, 10**5} <= set(times)
    assert convergence.fit_slope(times, [3 * t**-0.5 for t in times]) == pytest.approx(-0.5, abs=1e-12)
    kinked = [torch.full((5, 1), t**-0.5 if t >= 100 else t**-2.0, dtype=torch.float64) for t in times]
    assert convergence.slope_of(times, kinked, 0, since=100) == pytest.approx((-0.5, 0), abs=1e-12)
    generator, covered = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        noise = (0.1 * torch.randn(len(times), 5, 1, generator=generator, dtype=torch.float64)).exp()
        mean, half = convergence.slope_of(
            times, [3 * t**-0.5 * n for t, n in zip(times, noise, strict=True)], 0, since=100
        )
        covered += abs(mean + 0.5) <= half
    assert 180 <= covered <= 198  # of 200 intervals of 95%


def test_what_is_averaged_is_the_loss_at_every_iterate(convergence, problems):
    """Sparse evaluation with straight lines between, against the sum over every step."""
    variants, seen = [convergence.Variant(rate=0.1)], []
    step = convergence.BlockAdam.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            convergence.BlockAdam, "step", lambda self, w, *rest: (seen.append(w.clone()), step(self, w, *rest))
        )
        record = convergence.run(problems, variants, 2000, batch_rows=16)
    lowest = problems.loss(problems.optimum())
    gaps = torch.stack([problems.loss(w) - lowest for w in seen])
    for t, mean in zip(record.times, record.mean_gap, strict=True):
        assert torch.allclose(mean, gaps[:t].mean(0), rtol=1e-12 if t < 100 else 5e-3)
    assert torch.allclose(record.gap[-1], gaps[-1], rtol=1e-12)
    assert torch.allclose(record.gap_of_mean[-1], problems.loss(sum(seen) / 2000) - lowest, rtol=1e-9)
    assert torch.allclose(record.tail[1000], sum(seen[500:1000]) / 500, rtol=1e-9)
    assert (record.mean_gap[-1] >= record.gap_of_mean[-1]).all()  # f is convex


def test_each_variant_is_told_at_its_best_rate(convergence, problems):
    variants = [convergence.Variant(rate=rate) for rate in (1e-4, 0.1, 100.0)]
    record = convergence.run(problems, variants, 100)
    assert convergence.best_rates(record, variants) == {convergence.Variant(): 1}


def test_looking_at_the_whole_loss_does_not_change_a_run(convergence):
    model, windows = (
        make_llama(layers=3),
        torch.randint(3, VOCABULARY, (12, 9), generator=torch.Generator().manual_seed(0)),
    )
    variant = convergence.Variant(2, "reset_layers", num_active=1, rate=1e-2)
    losses, seen = convergence.model_run(model, windows, variant, 6, 0, times=(1, 4))
    assert losses == convergence.model_run(model, windows, variant, 6, 0)[0]
    model.zero_grad()
    loss = convergence.window_loss(model, windows)  # of w_1: model_run trains a copy
    loss.backward()
    sq_gradient = sum(p.grad.square().sum().item() for p in model.parameters())
    assert seen[1] == pytest.approx((loss.item(), sq_gradient), rel=1e-5)  # sums in another order
    assert seen[4][1] > 0
    assert seen[4] != seen[1]


def test_without_the_shared_model_one_is_told_what_is_missing(convergence, monkeypatch, tmp_path):
    monkeypatch.setattr(convergence, "SHARED", tmp_path)
    with pytest.raises(SystemExit, match="skipped: there is no shared/models/stories260K/hf beside the checkout"):
        convergence.load_model_and_windows()


def test_the_page_tells_of_every_variant_and_shows_the_figure(convergence, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys.modules["results"], "HERE", tmp_path)
    steps = ["--steps", "100", "--full-batch-steps", "100", "--limit-steps", "100"]
    monkeypatch.setattr(sys, "argv", ["convergence.py", "convex", "--seeds", "2", *steps])
    convergence.main()
    (page,) = (tmp_path / "results").glob("*.md")
    text, figure = page.read_text(encoding="utf-8"), page.with_suffix(".svg").read_text(encoding="utf-8")
    assert f"({page.stem}.svg)" in text
    assert text.count("\n| 20 | dropped |") == 2 * 2 + 1 + 2 + 2  # with and without 1/p; limit; constant rate; decay
    assert "<svg" in figure
    assert convergence.GREY in figure
    assert len(figure) < 200_000


@pytest.mark.parametrize("steps", ["5000", "10", "-10"])
def test_a_number_of_steps_that_would_end_outside_a_decade_is_refused(convergence, monkeypatch, capsys, steps):
    monkeypatch.setattr(sys, "argv", ["convergence.py", "convex", "--limit-steps", steps])
    with pytest.raises(SystemExit):
        convergence.main()
    assert f"--limit-steps is {steps}: give a power of ten, from 100" in capsys.readouterr().err
