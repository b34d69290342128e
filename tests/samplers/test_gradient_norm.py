import copy
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frequencies import assert_frequencies
from lisatune import LisaEngine, UserError, find_layers
from lisatune.samplers.gradient_norm import GradientNormSampler
from lisatune.samplers.scores import gradient_sq_norms
from lisatune.samplers.weighted import WeightedSampler
from tiny import VOCABULARY, make_llama


def make_sampler(num_layers=6, num_active=2, interval_steps=3, seed=0, **options):
    return GradientNormSampler(num_layers, num_active, interval_steps, seed, **options)


def score(step, layer):
    """Another gradient at every step, and a larger one higher up."""
    return 1e-8 * (1 + layer) * (1.5 + math.sin(step * 7 + layer))


def run(sampler, first_step, last_step):
    """The draws of these steps, as an engine would make them: one at the begin of each interval."""
    draws = []
    for step in range(first_step, last_step):
        if step % sampler.interval_steps == 0 or not draws:
            active = sampler(step // sampler.interval_steps)
        sampler.observe(step, {layer: score(step, layer) for layer in active})
        draws.append(active)
    return draws


@pytest.mark.parametrize(("num_layers", "num_active"), [(6, 2), (7, 3), (5, 5), (4, 1)])
def test_layers_never_seen_are_drawn_first(num_layers, num_active):
    sampler = make_sampler(num_layers, num_active, interval_steps=1)
    first = math.ceil(num_layers / num_active)
    draws = run(sampler, 0, first)
    assert {layer for active in draws for layer in active} == set(range(num_layers))
    assert all(len(active) == num_active for active in draws)
    seen = [layer for active in draws[:-1] for layer in active]
    assert len(seen) == len(set(seen))


@given(
    num_layers=st.integers(1, 12), interval_steps=st.integers(1, 4), refresh=st.integers(1, 3),
    seed=st.integers(0, 99), data=st.data(),
)  # fmt: skip
def test_stopped_anywhere_and_resumed_it_draws_the_same(num_layers, interval_steps, refresh, seed, data):
    """The state goes through JSON; the resumed sampler is asked in mid-interval for the draw it had made before."""
    num_active = data.draw(st.integers(0, num_layers))
    stop = data.draw(st.integers(0, 40))

    def make():
        return make_sampler(num_layers, num_active, interval_steps, seed, refresh_intervals=refresh)

    straight, stopped, resumed = make(), make(), make()
    expected = run(straight, 0, 50)
    run(stopped, 0, stop)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert run(resumed, stop, 50) == expected[stop:]
    assert resumed.state_dict() == straight.state_dict()


def test_to_draw_changes_nothing():
    sampler = make_sampler()
    run(sampler, 0, 31)
    before = copy.deepcopy(sampler.state_dict())
    draws = [sampler(i) for i in (10, 11, 50, 10)]
    assert sampler.inclusion(11) == sampler.inclusion(11)
    assert sampler.state_dict() == before
    assert draws[0] == draws[3]


def test_the_state_given_out_is_a_copy():
    sampler = make_sampler()
    state = sampler.state_dict()
    before = copy.deepcopy(state)
    other = make_sampler()
    other.load_state_dict(state)
    run(sampler, 0, 30)
    run(other, 0, 30)
    assert state == before
    for values in (given_out := sampler.state_dict()).values():
        if isinstance(values, list):
            values[0] = 7
    assert sampler.state_dict() == other.state_dict() != given_out


def test_what_is_observed_in_an_interval_does_not_change_its_draw():
    sampler = make_sampler(interval_steps=4)
    run(sampler, 0, 20)
    for step in range(20, 24):
        active = sampler(5)
        sampler.observe(step, dict.fromkeys(active, 1e6))
        assert sampler(5) == active
        assert sampler.inclusion(5) == make_copy(sampler).inclusion(5)
    assert max(sampler.inclusion(6)) > max(sampler.inclusion(5))


def make_copy(sampler):
    other = make_sampler(interval_steps=sampler.interval_steps)
    other.load_state_dict(sampler.state_dict())
    return other


def test_layers_are_active_as_often_as_inclusion_says():
    sampler = make_sampler(interval_steps=1, temperature=0.5)
    assert_frequencies(sampler, first=0)  # all unseen: evenly
    sampler.observe(0, {0: 1e-8, 4: 9e-8, 5: 4e-8})
    assert_frequencies(sampler, first=1)  # two of the three unseen
    assert sampler.inclusion(1) == (0.0, 2 / 3, 2 / 3, 2 / 3, 0.0, 0.0)
    sampler.observe(1, {1: 1e-8, 2: 16e-8})
    assert_frequencies(sampler, first=2)  # the one unseen, and one of the others by weight
    assert sampler.inclusion(2)[3] == 1.0
    sampler.observe(2, {3: 1e-8, 4: 1e-8})
    assert_frequencies(sampler, first=3)
    assert sum(sampler.inclusion(3)) == pytest.approx(2)


def test_chances_are_the_softmax_of_smoothed_root_mean_squares():
    """By hand: layer 0 seen in intervals 0 and 2, layer 1 in interval 1, two steps each."""
    sampler = make_sampler(2, 1, interval_steps=2, temperature=0.7, exploration=0.2, smoothing=0.25)
    observed = [(0, 0, 1.0), (1, 0, 9.0), (2, 1, 4.0), (3, 1, 4.0), (4, 0, 36.0), (5, 0, 64.0)]
    for step, layer, mean_square in observed:
        sampler.observe(step, {layer: mean_square})
    first = (1 + 3) / 2
    scores = 0.25 * (6 + 8) / 2 + 0.75 * first, (2 + 2) / 2
    mean = sum(scores) / 2
    powers = [math.exp(s / mean / 0.7) for s in scores]
    expected = [0.8 * power / sum(powers) + 0.2 / 2 for power in powers]
    assert sampler.inclusion(3) == pytest.approx(expected, rel=1e-13)
    weighted = WeightedSampler(2, 1, tuple(expected), seed=0)
    assert [sampler(i) for i in range(3, 200)] == [weighted(i) for i in range(3, 200)]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_size_of_gradients_has_no_part_in_the_chances(scale):
    sampler = make_sampler(3, 1, interval_steps=1)
    sampler.observe(0, {layer: scale * (1 + layer) for layer in range(3)})
    unit = make_sampler(3, 1, interval_steps=1)
    unit.observe(0, {layer: 1.0 + layer for layer in range(3)})
    assert sampler.inclusion(1) == pytest.approx(unit.inclusion(1), rel=1e-12)


def test_a_low_temperature_draws_the_highest_and_exploration_leaves_none_out():
    def inclusion(**options):
        sampler = make_sampler(4, 1, interval_steps=1, **options)
        sampler.observe(0, {layer: 1e-8 * (1 + layer) for layer in range(4)})
        return sampler.inclusion(1)

    assert inclusion(temperature=1e-3, exploration=0.0)[3] == pytest.approx(1.0)
    assert inclusion(temperature=1e-3, exploration=0.2) == pytest.approx((0.05, 0.05, 0.05, 0.85))
    assert inclusion(temperature=1e9, exploration=0.0) == pytest.approx((0.25,) * 4)
    assert inclusion(exploration=1.0) == pytest.approx((0.25,) * 4)


def test_even_at_a_low_temperature_as_many_layers_are_drawn_as_asked_for():
    sampler = make_sampler(4, 3, interval_steps=1, temperature=1e-9, exploration=0.0)
    sampler.observe(0, {layer: 1e-8 * (1 + layer) for layer in range(4)})
    assert all(len(sampler(i)) == 3 for i in range(1, 50))


def test_gradients_of_zero_are_drawn_evenly():
    sampler = make_sampler(4, 1, interval_steps=1)
    sampler.observe(0, dict.fromkeys(range(4), 0.0))
    assert sampler.inclusion(1) == pytest.approx((0.25,) * 4)


def test_new_scores_count_from_the_next_refresh_on():
    sampler = make_sampler(2, 1, interval_steps=2, refresh_intervals=3, exploration=0.0)
    sampler.observe(0, {0: 1.0, 1: 1.0})
    assert sampler.inclusion(3) == pytest.approx((0.5, 0.5))
    for step in range(6, 12):  # intervals 3 to 5
        sampler.observe(step, {0: 100.0})
        assert sampler.inclusion(step // 2) == pytest.approx((0.5, 0.5))
    assert sampler.inclusion(6)[0] > 0.7


def test_steps_may_be_left_out_but_not_go_back():
    sampler = make_sampler(interval_steps=2)
    sampler.observe(1, {0: 1.0})
    sampler.observe(11, {1: 1.0})  # interval 5
    assert sampler.inclusion(6)[0] == sampler.inclusion(6)[1] == 0.0  # both seen, and others not
    with pytest.raises(UserError, match="step 9 was observed after steps of a later interval"):
        sampler.observe(9, {0: 1.0})
    sampler.observe(10, {0: 1.0})


@pytest.mark.parametrize(("scores", "message"), [
    ({6: 1.0}, "there is no layer 6 to observe: the sampler draws from 6"),
    ({2: -1.0}, r"the squared gradient of layer 2 is -1\.0 at step 0"),
    ({2: float("nan")}, "the squared gradient of layer 2 is nan"),
    ({2: float("inf")}, "the squared gradient of layer 2 is inf"),
])  # fmt: skip
def test_a_bad_score_is_refused_and_nothing_of_the_step_counts(scores, message):
    sampler = make_sampler()
    before = sampler.state_dict()
    with pytest.raises(UserError, match=message):
        sampler.observe(0, {0: 1.0} | scores)
    assert sampler.state_dict() == before


@pytest.mark.parametrize(("options", "message"), [
    ({"interval_steps": 0}, "interval_steps is 0: choose at least 1"),
    ({"refresh_intervals": 0}, "refresh_intervals is 0: choose at least 1"),
    ({"temperature": 0.0}, r"temperature is 0\.0: choose a number above 0"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"exploration": 1.1}, r"exploration is 1\.1: choose 0 to 1"),
    ({"exploration": -0.1}, r"exploration is -0\.1"),
    ({"smoothing": 0.0}, r"smoothing is 0\.0: choose a number above 0, at most 1"),
    ({"num_active": 7}, "choose 0 to 6"),
])  # fmt: skip
def test_refusals(options, message):
    with pytest.raises(UserError, match=message):
        make_sampler(**options)


def test_state_of_another_model_is_refused():
    with pytest.raises(UserError, match="the saved scores are of 6 layers, but the sampler draws from 4"):
        make_sampler(4).load_state_dict(make_sampler(6).state_dict())


def test_a_run_stopped_in_mid_interval_ends_at_the_same_weights_to_the_bit():
    """With the engine, a model and its real gradients; the state goes through JSON."""

    def parts(model_seed):
        model = make_llama(seed=model_seed)
        optimizer, layers = torch.optim.AdamW(model.parameters(), lr=1e-2), find_layers(model)
        sampler = GradientNormSampler(4, 2, interval_steps=3, seed=1, temperature=0.3)
        return model, optimizer, sampler, layers, LisaEngine(layers, sampler, interval_steps=3)

    def train(first, last, model, optimizer, sampler, layers, engine):
        for step in range(first, last):
            engine.begin_step(step, optimizer)
            ids = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(step))
            model(input_ids=ids, labels=ids).loss.backward()
            scores = gradient_sq_norms(layers, engine.pool, mean=True)
            assert tuple(scores) == engine.drawn
            sampler.observe(step, scores)
            optimizer.step()
            optimizer.zero_grad()

    straight, resumed = parts(0), parts(1)
    train(0, 11, *straight)
    resumed[0].load_state_dict(straight[0].state_dict())
    resumed[1].load_state_dict(copy.deepcopy(straight[1].state_dict()))
    resumed[2].load_state_dict(json.loads(json.dumps(straight[2].state_dict())))
    train(11, 24, *straight)
    train(11, 24, *resumed)
    assert straight[2].state_dict() == resumed[2].state_dict()
    for a, b in zip(straight[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_draws_are_pinned():
    """A change of these numbers would break every stopped run: bump the major version first."""
    assert run(make_sampler(interval_steps=1), 0, 8) == [(0, 4), (2, 3), (1, 5), (4, 5), (1, 4), (2, 4), (0, 3), (1, 3)]
