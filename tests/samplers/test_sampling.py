import math
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frequencies import assert_frequencies, plausible
from lisatune import UniformSampler, UserError
from lisatune.samplers.bernoulli import BernoulliSampler
from lisatune.samplers.fixed import FixedSampler
from lisatune.samplers.round_robin import RoundRobinSampler
from lisatune.samplers.sweep import SweepSampler


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
    assert [BernoulliSampler(32, 0.0625, seed=0)(i) for i in range(4)] == [(), (3, 27), (), (7, 8, 16, 21, 23, 25)]
    assert [SweepSampler(32, 2, seed=0)(i) for i in (0, 1, 16, 17)] == [(0, 15), (4, 26), (3, 27), (2, 7)]


def test_seeds_and_intervals_differ():
    draws = {UniformSampler(32, 2, seed)(interval) for seed in range(5) for interval in range(5)}
    assert len(draws) > 15


@pytest.mark.parametrize("num_active", [-1, 5])
@pytest.mark.parametrize("sampler", [UniformSampler, SweepSampler, RoundRobinSampler])
def test_refuses_more_layers_than_there_are(num_active, sampler):
    with pytest.raises(UserError, match=r"has 4 decoder layers: choose 0 to 4"):
        sampler(4, num_active)


@pytest.mark.parametrize("make", [
    lambda n: UniformSampler(n, 0), lambda n: BernoulliSampler(n, 0.5), lambda n: SweepSampler(n, 0),
    lambda n: RoundRobinSampler(n, 0), lambda n: FixedSampler(n, ()),
])  # fmt: skip
def test_refuses_a_model_without_layers(make):
    make(1)
    with pytest.raises(UserError, match="num_layers is 0: a model needs at least 1 decoder layer"):
        make(0)


SAMPLERS = [
    UniformSampler(7, 2, seed=4),
    BernoulliSampler(7, 0.3, seed=4),
    BernoulliSampler(7, (0.0, 0.05, 0.3, 0.5, 0.7, 0.95, 1.0), seed=4),
    SweepSampler(7, 3, seed=4),
    SweepSampler(8, 2, seed=4),
    RoundRobinSampler(7, 3),
    RoundRobinSampler(7, 3, descending=True),
    FixedSampler(7, (6, 0)),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_layers_are_active_as_often_as_inclusion_says(sampler):
    # of 4,200 intervals every plan of 7 or 8 layers is a whole number of rounds
    assert_frequencies(sampler, num_intervals=4_200)
    assert len(sampler.inclusion(3)) == sampler.num_layers


def test_chances_are_those_of_the_closed_forms():
    assert UniformSampler(32, 2).inclusion(0) == RoundRobinSampler(32, 2).inclusion(9) == (1 / 16,) * 32
    assert BernoulliSampler(2, 0.25).inclusion(0) == (0.25, 0.25)
    assert BernoulliSampler(2, (0.25, 1)).inclusion(0) == (0.25, 1)
    assert SweepSampler(7, 3).inclusion(0) == (1 / 3,) * 7
    for idle in (UniformSampler(3, 0), SweepSampler(3, 0), RoundRobinSampler(3, 0), FixedSampler(3, ())):
        assert idle.inclusion(0) == (0.0, 0.0, 0.0)
        assert idle(5) == ()


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@given(interval=st.integers(0, 10**6))
def test_layers_are_distinct_ascending_and_there(sampler, interval):
    active = sampler(interval)
    assert list(active) == sorted(set(active))
    assert set(active) <= set(range(sampler.num_layers))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_draws_do_not_depend_on_what_was_drawn_before(sampler):
    forward = [sampler(i) for i in range(20)]
    assert [sampler(i) for i in reversed(range(20))] == forward[::-1]


def test_bernoulli_layers_are_drawn_by_themselves():
    """Every one of the 8 sets of 3 layers is as likely as the product of its layers' chances."""
    chances = (0.2, 0.5, 0.9)
    counts = Counter(BernoulliSampler(3, chances, seed=1)(i) for i in range(5_000))
    for number in range(8):
        active = tuple(layer for layer in range(3) if number >> layer & 1)
        chance = math.prod(c if layer in active else 1 - c for layer, c in enumerate(chances))
        assert plausible(counts[active], 5_000, chance)


@pytest.mark.parametrize(("probability", "message"), [
    (1.5, "the probability of layer 0 is 1.5: choose 0 to 1"),
    ((0.5, -0.1), "the probability of layer 1 is -0.1"),
    ((0.5, float("nan")), "the probability of layer 1 is nan"),
    ((0.5,), "1 probabilities were given for 2 layers"),
])  # fmt: skip
def test_bernoulli_refuses_what_is_no_chance(probability, message):
    with pytest.raises(UserError, match=message):
        BernoulliSampler(2, probability)


@given(num_layers=st.integers(1, 40), sweep=st.integers(0, 1000), seed=st.integers(0, 100), data=st.data())
def test_every_layer_is_drawn_exactly_once_in_each_sweep(num_layers, sweep, seed, data):
    num_active = data.draw(st.integers(1, num_layers))
    sampler = SweepSampler(num_layers, num_active, seed)
    length = sampler.sweep_intervals
    assert length == math.ceil(num_layers / num_active)
    draws = [sampler(i) for i in range(sweep * length, (sweep + 1) * length)]
    assert sorted(layer for active in draws for layer in active) == list(range(num_layers))
    sizes = {len(active) for active in draws}
    assert max(sizes) <= num_active
    assert max(sizes) - min(sizes) <= 1


def test_orders_of_sweeps_differ_and_no_layer_comes_first_more_often():
    num_sweeps = 3_000
    sampler = SweepSampler(5, 1, seed=2)
    firsts = Counter(sampler(5 * sweep)[0] for sweep in range(num_sweeps))
    assert all(plausible(firsts[layer], num_sweeps, 1 / 5) for layer in range(5))
    orders = {tuple(sampler(5 * sweep + i) for i in range(5)) for sweep in range(num_sweeps)}
    assert len(orders) == math.factorial(5)


def test_no_layer_waits_longer_than_two_sweeps_less_two_intervals():
    sampler = SweepSampler(8, 2, seed=0)
    waits = []
    for layer in range(8):
        turns = [i for i in range(2_000) if layer in sampler(i)]
        waits += [later - earlier - 1 for earlier, later in pairwise(turns)]
    assert max(waits) == 2 * sampler.sweep_intervals - 2


@given(num_layers=st.integers(1, 40), start=st.integers(0, 1000), descending=st.booleans(), data=st.data())
def test_round_robin_gives_every_layer_as_many_turns(num_layers, start, descending, data):
    num_active = data.draw(st.integers(0, num_layers))
    sampler = RoundRobinSampler(num_layers, num_active, descending)
    turns = Counter(layer for i in range(start * num_layers, (start + 1) * num_layers) for layer in sampler(i))
    assert turns == Counter({layer: num_active for layer in range(num_layers) if num_active})
    assert all(len(sampler(i)) == num_active for i in range(3))


def test_round_robin_goes_up_or_down():
    up, down = RoundRobinSampler(5, 2), RoundRobinSampler(5, 2, descending=True)
    assert [up(i) for i in range(6)] == [(0, 1), (2, 3), (0, 4), (1, 2), (3, 4), (0, 1)]
    assert [down(i) for i in range(3)] == [(3, 4), (1, 2), (0, 4)]


def test_fixed_layers_never_change():
    sampler = FixedSampler(4, (3, 1))
    assert {sampler(i) for i in range(100)} == {(1, 3)}
    assert sampler.inclusion(0) == (0.0, 1.0, 0.0, 1.0)


@pytest.mark.parametrize(("layers", "message"), [
    ((4,), "there is no layer 4 to train: choose 0 to 3"), ((-1,), "there is no layer -1"),
    ((1, 1), "layer 1 is named twice"),
])  # fmt: skip
def test_fixed_refuses_layers_that_are_not_there(layers, message):
    with pytest.raises(UserError, match=message):
        FixedSampler(4, layers)


def test_samplers_need_no_torch():
    """The command line shows its help, and checks a config, without waiting for torch."""
    code = "import sys, lisatune.samplers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
