import math
from collections import Counter
from fractions import Fraction
from itertools import combinations, permutations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from frequencies import plausible
from lisatune.samplers import draws
from lisatune.samplers.draws import draw_by_weights, hashed, inclusion_by_weights


def chances_of_sets(weights, num_drawn):
    """By the definition: one drawn after another, by weight among those left; exact fractions."""
    chances = Counter()
    for order in permutations([i for i, w in enumerate(weights) if w], num_drawn):
        left, chance = sum(map(Fraction, weights)), Fraction(1)
        for i in order:
            chance *= Fraction(weights[i]) / left
            left -= Fraction(weights[i])
        chances[tuple(sorted(order))] += chance
    return chances


WEIGHTS = st.lists(st.one_of(st.just(0.0), st.floats(1e-12, 1e12)), min_size=1, max_size=5).filter(any)


@given(weights=WEIGHTS, num_drawn=st.integers(0, 5))
@example(weights=[1e-30, 1.0, 1e30, 5.0], num_drawn=2)
@example(weights=[1e-12, 1e-12, 1.0], num_drawn=2)
def test_inclusion_is_exact_to_rounding(weights, num_drawn):
    """1e-13 of each chance: nothing is subtracted on the way, and 5e-15 is the most seen."""
    num_drawn = min(num_drawn, sum(w > 0 for w in weights))
    exact = chances_of_sets(weights, num_drawn)
    inclusion = inclusion_by_weights(tuple(weights), num_drawn)
    for i, chance in enumerate(inclusion):
        expected = float(sum((p for active, p in exact.items() if i in active), Fraction(0)))
        assert chance == pytest.approx(expected, rel=1e-13, abs=0)


@pytest.mark.parametrize(("num_layers", "num_drawn"), [(32, 2), (32, 16), (80, 40), (32, 31), (224, 8), (112, 56)])
def test_inclusion_of_many_layers_sums_to_what_is_drawn_and_does_not_depend_on_the_step(
    num_layers, num_drawn, monkeypatch
):
    weights = tuple(1.0 + 9 * math.sin(i) ** 2 for i in range(num_layers))
    chances = inclusion_by_weights(weights, num_drawn)
    assert sum(chances) == pytest.approx(num_drawn, rel=1e-13)
    monkeypatch.setattr(draws, "LOG_TIME_STEP", draws.LOG_TIME_STEP / 2)
    inclusion_by_weights.cache_clear()
    assert inclusion_by_weights(weights, num_drawn) == pytest.approx(chances, rel=1e-13, abs=0)
    inclusion_by_weights.cache_clear()


def test_inclusion_of_equal_weights_and_of_all_that_can_be_drawn():
    assert inclusion_by_weights((3.0,) * 7, 2) == pytest.approx((2 / 7,) * 7, rel=1e-14)
    assert inclusion_by_weights((3.0, 0.0, 1e-300, 1e300), 3) == (1.0, 0.0, 1.0, 1.0)
    assert inclusion_by_weights((3.0, 0.0), 0) == (0.0, 0.0)


def test_weights_of_any_size_overflow_nothing():
    low, middle, high = inclusion_by_weights((1e-300, 1.0, 1e300), 1)
    assert (middle, high) == (pytest.approx(1e-300), pytest.approx(1.0))
    assert low == pytest.approx(0.0, abs=1e-300)


@pytest.mark.parametrize("num_drawn", [1, 2, 3])
def test_every_set_is_drawn_as_often_as_one_drawn_after_another_would_be(num_drawn):
    weights, num_trials = (1.0, 2.0, 0.5, 6.0), 5_000
    counts = Counter(
        draw_by_weights(weights, num_drawn, [hashed(0, i, layer) for layer in range(4)]) for i in range(num_trials)
    )
    exact = chances_of_sets(weights, num_drawn)
    assert set(counts) <= set(exact)
    for active in combinations(range(4), num_drawn):
        assert plausible(counts[active], num_trials, float(exact[active])), active


@given(
    hashes=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=8, unique=True),
    scale=st.floats(1e-300, 1e300),
    data=st.data(),
)
@example(hashes=[0, 1, 2**64 - 1, 2**64 - 2, 2**63, 2**63 - 1], scale=1.0, data=None)
def test_equal_weights_draw_the_smallest_hashes(hashes, scale, data):
    """The ends too, where a number from a hash rounds to 0 or 1."""
    num_drawn = len(hashes) // 2 if data is None else data.draw(st.integers(0, len(hashes)))
    smallest = sorted(range(len(hashes)), key=hashes.__getitem__)[:num_drawn]
    assert draw_by_weights([scale] * len(hashes), num_drawn, hashes) == tuple(sorted(smallest))


def test_hashes_are_pinned_and_spread_evenly():
    assert hashed(0, 7, 3) == 1090000329070715890
    assert hashed(-1, 2**70, 3) != hashed(1, 2**70, 3)
    tops = Counter(hashed(5, i, layer) >> 61 for i in range(100) for layer in range(40))
    assert all(plausible(tops[top], 4_000, 1 / 8) for top in range(8))
