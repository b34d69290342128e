import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frequencies import assert_frequencies
from lisatune import UniformSampler, UserError
from lisatune.samplers.weighted import WeightedSampler, parse_weights, read_weights


@pytest.mark.parametrize("num_active", [0, 1, 2, 4, 5])
def test_layers_are_active_as_often_as_inclusion_says(num_active):
    assert_frequencies(WeightedSampler(6, num_active, (0.5, 3.0, 0.0, 1.0, 1.0, 20.0), seed=3))


@given(num_layers=st.integers(1, 40), interval=st.integers(0, 10**6), seed=st.integers(0, 2**32), data=st.data())
def test_equal_weights_draw_what_the_uniform_sampler_draws(num_layers, interval, seed, data):
    num_active = data.draw(st.integers(0, num_layers))
    weights = (data.draw(st.floats(1e-9, 1e9)),) * num_layers
    uniform = UniformSampler(num_layers, num_active, seed)
    assert WeightedSampler(num_layers, num_active, weights, seed)(interval) == uniform(interval)


def test_draws_are_pinned():
    """A change of these numbers would break every stopped run: bump the major version first."""
    sampler = WeightedSampler(32, 2, tuple(range(32)), seed=0)
    assert [sampler(i) for i in range(4)] == [(15, 26), (17, 27), (16, 31), (8, 25)]


def test_a_layer_of_weight_0_is_never_drawn():
    sampler = WeightedSampler(4, 3, (1e-30, 0.0, 1e30, 1.0))
    assert {sampler(i) for i in range(500)} == {(0, 2, 3)}
    assert sampler.inclusion(0) == (1.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize(("weights", "num_active", "message"), [
    ((1.0, 2.0), 1, "2 weights were given for 3 layers: give one for each"),
    ((1.0, -2.0, 1.0), 1, "the weight of layer 1 is -2.0: give a number from 0 up"),
    ((1.0, float("nan"), 1.0), 1, "the weight of layer 1 is nan"),
    ((1.0, float("inf"), 1.0), 1, "the weight of layer 1 is inf"),
    ((1.0, 0.0, 0.0), 2, "num_active is 2, but only 1 of 3 layers have a weight above 0"),
    ((0.0, 0.0, 0.0), 1, "num_active is 1, but only 0 of 3"),
    ((1.0, 1.0, 1.0), 4, "choose 0 to 3"),
])  # fmt: skip
def test_refusals(weights, num_active, message):
    with pytest.raises(UserError, match=message):
        WeightedSampler(3, num_active, weights)


def test_weights_are_read_from_a_list_or_by_name(tmp_path):
    path = tmp_path / "weights.json"
    path.write_text("[1, 0.25, 0]")
    assert read_weights(path, 3) == read_weights(str(path), 3) == (1.0, 0.25, 0.0)
    path.write_text('{"layers.2": 0, "layers.0": 1, "layers.1": 0.25}')
    assert read_weights(path, 3) == (1.0, 0.25, 0.0)
    path.write_text('{"layers.0": 1, "embedding": 0.5}')
    assert read_weights(path, 2, names=("layers.0", "embedding")) == (1.0, 0.5)
    weights = (1 / 3, 1e-300, 7e22)
    path.write_text(json.dumps(weights))
    assert read_weights(path, 3) == weights


def test_layer_1_is_not_layer_10():
    weights = {f"layers.{i}": float(i) for i in reversed(range(12))}
    assert parse_weights(weights, 12) == tuple(map(float, range(12)))


@pytest.mark.parametrize(("text", "message"), [
    ("[1, 2]", "2 weights were given for 3 layers: give one for each"),
    ("[1, 2, -3]", r"the weight of layers\.2 is -3: give a number from 0 up"),
    ("[1, 2, NaN]", r"the weight of layers\.2 is nan"),
    ("[1, 2, Infinity]", r"the weight of layers\.2 is inf"),
    ('[1, 2, "3"]', r"the weight of layers\.2 is '3'"),
    ("[1, 2, true]", r"the weight of layers\.2 is True"),
    ("[1, 2, null]", r"the weight of layers\.2 is None"),
    ("[0, 0, 0]", "all weights are 0, so no layer would ever train"),
    ('{"layers.0": 1, "layers.2": 1}', r"layers\.1 has no weight \(1 are missing\)"),
    ('{"layers.0": 1, "layers.1": 1, "layers.2": 1, "layer.1": 1}', r"no 'layer\.1' to give a weight; did you mean"),
    ('{"x": 1}', r"no 'x' to give a weight: name layers\.0 to layers\.2"),
    ("3", "holds 3: give a list of weights, or an object"),
    ("[1, 2", "are not valid JSON: "),
])  # fmt: skip
def test_a_file_of_another_form_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "weights.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_weights(path, 3)
    assert str(path) in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read from .*absent.json: No such file"):
        read_weights(tmp_path / "absent.json", 3)
