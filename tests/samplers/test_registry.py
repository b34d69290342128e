import json

import pytest

from frequencies import assert_frequencies
from lisatune import UniformSampler, UserError
from lisatune.samplers import SAMPLERS, make_sampler
from lisatune.samplers.bernoulli import BernoulliSampler
from lisatune.samplers.fixed import FixedSampler
from lisatune.samplers.gradient_norm import GradientNormSampler
from lisatune.samplers.round_robin import RoundRobinSampler
from lisatune.samplers.sweep import SweepSampler
from lisatune.samplers.weighted import WeightedSampler

COMMON = {"num_layers": 4, "num_active": 2, "interval_steps": 5, "seed": 3}


def make(name, **options):
    return make_sampler(name, **COMMON, **options)


def test_each_name_makes_its_sampler_from_plain_arguments():
    assert make("uniform") == UniformSampler(4, 2, 3)
    assert make("bernoulli") == BernoulliSampler(4, 0.5, 3)
    assert make("bernoulli", probabilities=[0, 0.5, 1, 1]) == BernoulliSampler(4, (0, 0.5, 1, 1), 3)
    assert make("sweep") == SweepSampler(4, 2, 3)
    assert make("round_robin", descending=True) == RoundRobinSampler(4, 2, descending=True)
    assert make("fixed", layers=[3]) == FixedSampler(4, (3,))
    assert make("fixed") == FixedSampler(4, UniformSampler(4, 2, 3)(0))
    assert make("weighted", weights=[1, 2, 3, 4]) == WeightedSampler(4, 2, (1.0, 2.0, 3.0, 4.0), 3)
    learning = make("gradient_norm", temperature=0.5, exploration=0.0, smoothing=0.1, refresh_intervals=2)
    assert isinstance(learning, GradientNormSampler)
    assert vars(learning).items() >= {**COMMON, "temperature": 0.5, "exploration": 0.0, "smoothing": 0.1}.items()
    assert learning.refresh_intervals == 2


def test_weights_come_from_a_file_or_by_the_names_of_the_pool(tmp_path):
    path = tmp_path / "weights.json"
    path.write_text(json.dumps([1, 2, 3, 4]))
    assert make("weighted", weights=str(path)).weights == make("weighted", weights=path).weights == (1, 2, 3, 4)
    names = ("layers.0", "layers.1", "layers.2", "embedding")
    weights = {"embedding": 9, "layers.0": 1, "layers.1": 1, "layers.2": 0}
    assert make("weighted", weights=weights, names=names).weights == (1, 1, 0, 9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_tells_its_chances(name):
    sampler = make(name, **({"weights": [1, 2, 3, 4]} if name == "weighted" else {}))
    assert sampler.num_layers == 4
    assert sum(sampler.inclusion(0)) == pytest.approx(2)
    assert_frequencies(sampler)


@pytest.mark.parametrize(("name", "options", "message"), [
    ("unifrom", {}, "there is no sampler 'unifrom'; did you mean 'uniform'"),
    ("x", {}, "there is no sampler 'x': choose one of uniform, bernoulli, sweep"),
    ("uniform", {"descending": True}, "sampler uniform has no option 'descending': it has no options"),
    ("uniform", {"num_layer": 1}, "sampler uniform has no option 'num_layer'"),
    ("round_robin", {"decending": True}, "sampler round_robin has no option 'decending'; did you mean 'descending'"),
    ("weighted", {}, "sampler weighted needs weights: a list, or the path of a JSON file"),
    ("weighted", {"weights": [1]}, "1 weights were given for 4 layers"),
])  # fmt: skip
def test_refusals(name, options, message):
    with pytest.raises(UserError, match=message):
        make(name, **options)


def test_bernoulli_refuses_more_layers_than_there_are():
    with pytest.raises(UserError, match="num_active is 5, but the model has 4 decoder layers"):
        make_sampler("bernoulli", num_layers=4, num_active=5)
