"""What a way to train is refused with: a CPU, several processes, other ways; each refusal is one sentence."""

import re
from itertools import combinations
from typing import get_args

import pytest

from lisatune import UserError
from lisatune.methods import METHODS, UNITS
from lisatune.optim import OPTIMS
from lisatune.samplers import SAMPLERS
from lisatune.settings import ROWS, TrainConfig, build_config, check_num_ranks
from ways import WAYS

FIELDS = TrainConfig.model_fields


def build(*settings):
    given = {"model": "m", "data": "d", "output": "o", "max_steps": 9, "eval_data": "e"}
    given |= {k: v for some in settings for k, v in some.items()}
    if given.get("method", "lisa") == "lisa" and "sampled_unit" not in given:
        given = {"recipe": "paper"} | given  # a way without a unit is one of layers
    return build_config(given)


def choices():
    """Every value that a choice can have, and every lever."""
    words = {"method": METHODS, "sampled_unit": UNITS, "sampler": SAMPLERS, "optim": OPTIMS}
    words |= {"state_policy": get_args(FIELDS["state_policy"].annotation)}
    named = [(name, word) for name, values in words.items() for word in values if word != FIELDS[name].default]
    levers = [name for name, row in ROWS.items() if row.ladder is not None and FIELDS[name].default is False]
    return named + [(name, True) for name in levers]


@pytest.mark.parametrize(("name", "value"), choices())
def test_each_choice_has_a_row_among_the_ways(name, value):
    """So that none goes without the tests that a row inherits."""
    assert any(getattr(build(way.settings), name) == value for way in WAYS)


def test_no_two_ways_have_one_name():
    assert len({way.name for way in WAYS}) == len(WAYS)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_way_is_refused_where_it_cannot_work_and_nowhere_else(way):
    config = build(way.settings)
    for num_ranks in (1, 2):
        check_num_ranks(config, num_ranks)
    if config.sampled_unit == "slices" and (config.interval_steps > 1 or config.state_policy == "keep"):
        with pytest.raises(
            UserError, match="^dp_shard_size cannot be more than 1 with slices that hold optimizer state"
        ):
            build(way.settings, {"dp_shard_size": 2})
    elif way.processes is None:
        refusal = (
            r"^\w+=.* needs whole weights in each process|^dp_shard_size cannot be more than 1 with optim=factored"
        )
        with pytest.raises(UserError, match=refusal):
            check_num_ranks(build(way.settings, {"dp_shard_size": 2}), 2)
    else:
        check_num_ranks(build(way.settings, {"dp_shard_size": 2}), 2)
    if way.is_for_gpu:
        with pytest.raises(UserError, match=r"^\w+ has no effect on a CPU, where host and device are one memory"):
            build(way.settings, {"device": "cpu"})
    else:
        build(way.settings, {"device": "cpu"})


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_setting_of_a_way_is_refused_by_methods_that_know_nothing_of_it(way):
    for method in METHODS:
        others = [name for name in way.settings if ROWS[name].methods and method not in ROWS[name].methods]
        if others:
            with pytest.raises(
                UserError, match=f"^({'|'.join(others)}) has no effect with method={method}: leave it out"
            ):
                build(way.settings, {"method": method})


def test_any_two_ways_go_together_or_are_refused_in_one_sentence():
    """A setting of both takes the second's value."""
    refusals = []
    for one, other in combinations(WAYS, 2):
        try:
            build(one.settings, other.settings)
        except UserError as error:
            refusals.append((one, other, str(error)))
    assert len(refusals) > 100
    for one, other, refusal in refusals:
        assert re.match(r"(\w+)[ =]", refusal)[1] in FIELDS, f"{one}, {other}: {refusal}"
        assert "\n" not in refusal
