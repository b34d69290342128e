import json
import sys

import pytest

from frequencies import assert_frequencies
from lisatune import LisaEngine, UniformSampler, UserError, find_layers
from lisatune.samplers import SAMPLERS, make_sampler
from lisatune.samplers.bernoulli import BernoulliSampler
from lisatune.samplers.fixed import FixedSampler
from lisatune.samplers.gradient_norm import GradientNormSampler
from lisatune.samplers.round_robin import RoundRobinSampler
from lisatune.samplers.sweep import SweepSampler
from lisatune.samplers.weighted import WeightedSampler
from lisatune.settings import build_config
from tiny import make_llama

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


OWN = """
from dataclasses import dataclass
from lisatune import Sampler

@dataclass(frozen=True)
class Top(Sampler):
    num_layers: int
    num_active: int
    below: int = 0

    def __call__(self, interval):
        return tuple(range(self.num_layers - self.below))[-self.num_active :]

class Nothing:
    pass
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_samplers.py").write_text(OWN)
    (tmp_path / "broken_samplers.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_samplers"
    sys.modules.pop("own_samplers", None)


def test_a_class_of_ones_own_is_found_by_its_module(own_module):
    sampler = make(f"{own_module}:Top", below=1)
    assert sampler(7) == (1, 2)
    assert not sampler.learns
    assert sampler.largest_draws([1, 1, 1, 1]) == [(2, 3)]
    with pytest.raises(UserError, match="Top does not say how likely a layer is to be drawn"):
        sampler.inclusion(0)
    with pytest.raises(UserError, match=f"sampler {own_module}:Top has no option 'belo'; did you mean 'below'"):
        make(f"{own_module}:Top", belo=1)
    config = build_config(
        {"model": "m", "data": "d", "output": "o", "sampler": f"{own_module}:Top", "sampler_options": {"below": 2}}
    )
    assert config.sampler == f"{own_module}:Top"


@pytest.mark.parametrize(("name", "message"), [
    ("own_samplers:Bottom", "cannot be imported .*has no attribute 'Bottom'.*: install its package, or set PYTHONPATH"),
    ("own_samplers:Nothing", "is not a sampler: write a dataclass that inherits from lisatune.Sampler"),
    ("broken_samplers:Top", "cannot be imported .division by zero."),
    ("no_such_module:Top", "cannot be imported .No module named 'no_such_module'."),
    (":Top", "cannot be imported"),
])  # fmt: skip
def test_refusals_of_a_class_of_ones_own(own_module, name, message):
    with pytest.raises(UserError, match=f"^sampler {name} .*{message}"):
        make(name)


def test_the_planner_learns_from_the_sampler_which_draws_are_largest():
    sizes = [5, 5, 5, 9]  # three layers and an embedding
    assert make("uniform").largest_draws(sizes) == [(2, 3)]
    assert make("uniform").largest_draws(sizes, num_decoder=3) == [(0, 3), (1, 2), (2, 3)]
    assert make("fixed", layers=[1, 0]).largest_draws(sizes, num_decoder=3) == [(0, 1)]
    # 4 chances of 1/2: 2 on average, and 2 + 2.33 * 1 bounds 99 of 100 draws, so all 4
    assert make("bernoulli").largest_draws(sizes) == [(0, 1, 2, 3)]
    assert make("bernoulli", probabilities=[0.01] * 4).largest_draws(sizes) == [(3,)]


def test_an_engine_wants_a_sampler_that_declares_what_it_can():
    with pytest.raises(UserError, match="function is not a sampler: let its class inherit from lisatune.Sampler"):
        LisaEngine(find_layers(make_llama()), lambda interval: (0,))
