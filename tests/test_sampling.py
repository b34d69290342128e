from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lisatune import UniformSampler, UserError


@given(num_layers=st.integers(1, 80), interval=st.integers(0, 10**6), seed=st.integers(0, 2**32), data=st.data())
def test_sample_depends_on_seed_and_interval_alone(num_layers, interval, seed, data):
    num_active = data.draw(st.integers(0, num_layers))
    active = UniformSampler(num_layers, num_active, seed)(interval)
    assert len(set(active)) == num_active
    assert all(0 <= layer < num_layers for layer in active)
    assert list(active) == sorted(active)
    assert active == UniformSampler(num_layers, num_active, seed)(interval)


def test_every_set_is_equally_likely():
    num_draws = 20_000
    counts = Counter(UniformSampler(5, 2, seed=3)(i) for i in range(num_draws))
    assert len(counts) == 10
    # chi-square with 9 degrees of freedom exceeds 27.9 once in 1,000 fair samplers; this one is fixed by its seed
    assert sum((n - num_draws / 10) ** 2 / (num_draws / 10) for n in counts.values()) < 27.9


def test_draws_are_pinned():
    """A change of these numbers would break every stopped run: bump the major version first."""
    assert [UniformSampler(32, 2, seed=0)(i) for i in range(4)] == [(0, 15), (3, 27), (9, 16), (8, 25)]


def test_seeds_and_intervals_differ():
    draws = {UniformSampler(32, 2, seed)(interval) for seed in range(5) for interval in range(5)}
    assert len(draws) > 15


@pytest.mark.parametrize("num_active", [-1, 5])
def test_refuses_more_layers_than_there_are(num_active):
    with pytest.raises(UserError, match=r"has 4 decoder layers: choose 0 to 4"):
        UniformSampler(4, num_active)
