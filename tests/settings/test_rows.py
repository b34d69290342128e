"""Every setting is a row, and what a row claims is enforced."""

import re
from typing import get_args

import pytest

from lisatune import UserError
from lisatune.methods import METHODS, RECIPES, UNITS
from lisatune.optim import OPTIMS
from lisatune.samplers import SAMPLERS
from lisatune.settings import ROWS, TrainConfig, build_config, check_num_ranks, differences, used_settings
from lisatune.settings.config import GROUPS, heading
from lisatune.settings.evaluation import BETWEEN
from lisatune.settings.memory import FACTORED_IN_SHARDS, IN_SHARDS
from lisatune.settings.methods import IN_FACTORS, NOT_FORGOTTEN
from lisatune.settings.row import Row
from lisatune.settings.rules import WORD, holds, is_on
from lisatune.tasks import TASKS

NEEDED = {"model": "m", "data": "d", "output": "o"}
FIELDS = TrainConfig.model_fields
REGISTRIES = {
    "task": TASKS,
    "method": METHODS,
    "sampler": SAMPLERS,
    "sampled_unit": UNITS,
    "optim": OPTIMS,
    "recipe": RECIPES,
}
MANNERED = re.compile(r"^Of |\b(beside|anew|lies?|is told|drawn?|so many (?!steps|minutes|from))\b")


def some_value(name):
    """A value of the setting other than its default, if there is one that needs nothing else."""
    default = FIELDS[name].default
    if name in REGISTRIES:
        return next(choice for choice in list(REGISTRIES[name])[1:])
    words = [w for kind in (FIELDS[name].annotation, *get_args(FIELDS[name].annotation)) for w in get_args(kind)]
    if numbers := [word for word in words if type(word) is int]:
        return numbers[0]
    words = [word for word in words if isinstance(word, str) and word != default]
    if isinstance(default, bool):
        return not default
    if words:
        return words[0]
    if isinstance(default, int | float):
        return default * 2 if default < 0.5 or isinstance(default, int) else default / 2
    kind = str(FIELDS[name].annotation)
    return {} if isinstance(default, dict) else "x" if "str" in kind else 0.5 if "float" in kind else 1


def build(*settings):
    """A config of LISA with layers, unless the settings say otherwise."""
    given = {k: v for some in (NEEDED, *settings) for k, v in some.items()}
    layers = given.get("method", "lisa") == "lisa" and "sampled_unit" not in given
    return build_config(({"recipe": "paper"} if layers else {}) | given)


def columns(column):
    return [(name, key) for name, row in ROWS.items() for key in getattr(row, column)]


def test_every_setting_is_a_row_in_one_group():
    listed = [name for group in GROUPS for name in group.model_fields]
    assert listed == list(FIELDS) == list(ROWS)
    assert all(isinstance(row, Row) for row in ROWS.values())
    assert len({heading(group) for group in GROUPS}) == len(GROUPS)


@pytest.mark.parametrize("name", ROWS)
def test_help_is_in_plain_sentences(name):
    text = FIELDS[name].description
    assert text[0].isupper() or text.split(";")[0].split(",")[0].split(" ")[0] in str(FIELDS[name]), text
    assert text.endswith("."), text
    assert not MANNERED.search(text), text
    for sentence in re.split(r"[.;:]\s", text):
        assert len(sentence.split()) <= 22, sentence


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.methods])
def test_another_method_is_refused(name):
    for method in METHODS:
        message = f"^{name} has no effect with method={method}: leave it out, or set method={ROWS[name].methods[0]}$"
        if method not in ROWS[name].methods:
            with pytest.raises(UserError, match=message):
                build({"method": method, name: FIELDS[name].default or some_value(name)})
            assert name not in used_settings(build({"method": method}))


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.tasks])
def test_another_task_is_refused(name):
    for task in TASKS:
        if task not in ROWS[name].tasks:
            with pytest.raises(UserError, match=f"^{name} has no effect with task={task}: leave it out, or set task="):
                build({"task": task, name: some_value(name)})
            assert name not in used_settings(build({"task": task}))


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.optims])
def test_another_optimizer_is_refused(name):
    for optim in OPTIMS:
        if optim not in ROWS[name].optims:
            with pytest.raises(UserError, match=f"^{name} has no effect with optim={optim}: leave it out"):
                build({"optim": optim, name: some_value(name)})
            assert name not in used_settings(build({"optim": optim}))


@pytest.mark.parametrize(("name", "condition"), columns("only_with"))
def test_what_plays_no_part_is_refused(name, condition):
    given = NEEDED | ({"max_steps": 5, "warmup_steps": 2} if holds(condition, build()) else {})
    slices = condition.startswith("sampled_unit!=slices")
    given |= {"sampled_unit": "slices"} if slices else {"recipe": "paper"}
    with pytest.raises(UserError, match=f"^{name} has no effect "):
        build_config(given | {name: some_value(name)})
    assert name not in used_settings(build_config(given))


def words_of(condition):
    return [WORD.fullmatch(word) for part in condition.split(" or ") for word in part.split(" and ")]


@pytest.mark.parametrize(
    ("name", "condition"),
    [pair for column in ("only_with", "needs", "never_with", "idle_with") for pair in columns(column)],
)
def test_conditions_speak_of_settings(name, condition):
    for match in words_of(condition):
        setting, operator, text = match.groups()
        assert setting.partition(".")[0] in FIELDS
        assert operator not in ("<", "<=") or text in FIELDS
    holds(condition, build())


def settings_of(words):
    """Settings under which all words of a condition hold: ``a=1``, ``a``; not ``a!=1``."""
    found = {}
    for match in words:
        setting, operator, text = match.groups()
        assert operator in (None, "=")
        setting, _, fact = setting.partition(".")
        if fact:
            text = next(choice for choice, facts in REGISTRIES[setting].items() if getattr(facts, fact))
        found[setting] = some_value(setting) if text is None else text
    return found


# what a setting needs to be allowed at all, so that the refusal in question is the one that is met
ALLOWED = {
    "activation_offloading": {"gradient_checkpointing": True},
    "offload_frozen": {"gradient_checkpointing": True},
    "frozen_bits": {"gradient_checkpointing": True},
    "optimizer_in_backward": {"max_grad_norm": 0},
    "eval_tasks": {"gradient_checkpointing": True},
    "precompute_ref_log_probs": {"task": "dpo"},
    "slices_of": {"sampled_unit": "slices"},
}


@pytest.mark.parametrize(("name", "condition"), columns("never_with"))
def test_what_cannot_go_together_is_refused(name, condition):
    others = settings_of(words_of(condition))
    allowed = {k: v for setting in (name, *others) for k, v in ALLOWED.get(setting, {}).items()}
    own = {name: some_value(name)} | others if name not in others else others
    with pytest.raises(UserError, match=f"^{name}(=\\w+)? cannot go with {re.escape(condition.partition(' and ')[0])}"):
        build(allowed, own)


@pytest.mark.parametrize(("name", "condition"), columns("idle_with"))
def test_what_would_have_no_effect_is_refused(name, condition):
    with pytest.raises(UserError, match=f"^{name} has no effect with {condition}, "):
        build(ALLOWED.get(name, {}), {name: some_value(name)}, settings_of(words_of(condition)))


BROKEN = {  # a config in which the need is not met, for needs whose words cannot be turned round one by one
    "sampled_unit=layers": {"recipe": "paper", "sampled_unit": "halves"},
    "sampled_unit!=slices and sampled_unit!=modules": {"sampled_unit": "slices"},
    "optim.in_blocks": {"optim": "lamb"},
    "num_active!=0": {"num_active": 0},
    "sampled_unit!=slices or num_active<=num_slices": {"sampled_unit": "slices", "num_active": 20, "num_slices": 15},
    "sampled_unit!=slices or sampler.for_slices": {"sampled_unit": "slices", "sampler": "bernoulli"},
    "max_steps=null or warmup_steps<max_steps": {"max_steps": 5, "warmup_steps": 5},
    "train_embedding or train_head": {"train_embedding": False, "train_head": False},
    "sampled_unit!=slices or train_embedding=true or train_head=true": {"sampled_unit": "slices"},
    NOT_FORGOTTEN: {"sampled_unit": "slices"},
    "optim.has_moments": {"optim": "spectral"},
    "packing=false or attn_implementation=auto or attn_implementation=eager or attn_implementation=sdpa": {
        "attn_implementation": "flash_attention_2",
        "packing": True,
    },
    "dtype!=float32": {"dtype": "float32"},
    FACTORED_IN_SHARDS: {"method": "full", "optim": "factored", "dp_shard_size": 2},
    IN_FACTORS: {"sampled_unit": "slices", "optim": "factored", "state_policy": "keep"},
    IN_SHARDS: {"sampled_unit": "slices", "interval_steps": 2, "dp_shard_size": 2},
    f"optim!=adamw_16bit and optim!=adamw_8bit or {NOT_FORGOTTEN}": {"sampled_unit": "slices", "optim": "adamw_8bit"},
    "gradient_checkpointing": {},
    "gradient_checkpointing=true": {},
    "max_grad_norm=0": {},
    "gradient_accumulation_steps=1": {"gradient_accumulation_steps": 2},
    "eval_data or eval_rows or samples": {},
    "eval_data or eval_rows=0": {"eval_rows": 3, "max_steps": 5},
    "task!=reward or save_merged": {"task": "reward", "method": "lora", "save_merged": False},
    "task!=kto or per_device_train_batch_size!=1": {"task": "kto", "per_device_train_batch_size": 1},
    "max_steps": {},
    next(iter(BETWEEN)): {},
}


@pytest.mark.parametrize(("name", "condition"), columns("needs"))
def test_needs_are_refused_if_not_met(name, condition):
    text = ROWS[name].needs[condition]
    broken = BROKEN[condition]
    allowed = (
        ALLOWED.get(name, {}) if condition.partition("=")[0] not in ("gradient_checkpointing", "max_grad_norm") else {}
    )
    start = re.escape(re.split(r"[{:]", text)[0])
    with pytest.raises(UserError, match=f"^{name}(=\\w+)?( |=).*{start}|^{name}=\\d+ leaves nothing"):
        build(allowed, {} if name in broken else {name: some_value(name)}, broken)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.gpu])
def test_what_is_for_a_gpu_is_refused_on_a_cpu(name):
    with pytest.raises(UserError, match=f"^{name} has no effect on a CPU, {ROWS[name].gpu}: leave it out"):
        build(ALLOWED.get(name, {}), {name: some_value(name), "device": "cpu"})
    build(ALLOWED.get(name, {}), {name: some_value(name), "device": "cuda"})


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.whole])
def test_what_needs_whole_weights_is_refused_with_shards(name):
    whole = ROWS[name].whole
    for value in whole if isinstance(whole, tuple) else [some_value(name)]:
        method = {"method": "lora"} if name.startswith("lora") else {}
        config = build(ALLOWED.get(name, {}), method, {name: value})
        check_num_ranks(config, 2)
        with pytest.raises(UserError, match=f"^{name}=.* needs whole weights in each process: .* dp_shard_size=1"):
            check_num_ranks(config.model_copy(update={"dp_shard_size": 2}), 2)
    method = {"method": "lora"} if name.startswith("lora") else {"recipe": "paper"}
    check_num_ranks(build(method, {"dp_shard_size": 2}), 2)


@pytest.mark.parametrize(("name", "choice"), [(name, choice) for name in REGISTRIES for choice in REGISTRIES[name]])
def test_choices_are_where_they_say(name, choice):
    facts = REGISTRIES[name][choice]
    assert callable(facts if name == "sampler" else facts.load())


@pytest.mark.parametrize(("name", "choice"), [(name, choice) for name in REGISTRIES for choice in REGISTRIES[name]])
def test_choices_say_whether_they_need_whole_weights(name, choice):
    if name == "recipe":
        return  # the unit says it
    config = build({name: choice} | ({"sampler_options": {"weights": [1]}} if choice == "weighted" else {}))
    check_num_ranks(config, 2)
    in_shards = config.model_copy(update={"dp_shard_size": 2})
    if REGISTRIES[name][choice].whole:
        with pytest.raises(UserError, match=f"^{name}={choice} needs whole weights in each process"):
            check_num_ranks(in_shards, 2)
    else:
        check_num_ranks(in_shards, 2)


@pytest.mark.parametrize("name", ROWS)
def test_what_a_resumed_run_may_change(name):
    assert bool(differences({name: 1}, {name: 2})) != ROWS[name].free


def test_the_planner_pulls_each_lever_once_to_a_value_that_it_can_have():
    numbers = [row.ladder for row in ROWS.values() if row.ladder is not None]
    assert len(set(numbers)) == len(numbers) > 5
    for name, row in ROWS.items():
        if row.ladder is not None and row.pulled is not None:
            assert is_on(name, build(ALLOWED.get(name, {}), {name: row.pulled}))
