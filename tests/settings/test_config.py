import pytest
import yaml

from lisatune import UserError
from lisatune.settings import TrainConfig, build_config, read_settings, write_config

NEEDED = {"model": "m", "data": "d", "output": "o"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rat": 1}, "unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        ({"zzz": 1}, "unknown setting 'zzz'$"),
        ({"num_active": 0}, "num_active is 0"),
        ({"num_active": -1}, "num_active=-1: input should be greater than or equal to 0"),
        ({"interval_steps": 0}, "interval_steps=0: input should be greater than or equal to 1"),
        ({"learning_rate": "fast"}, "learning_rate='fast': input should be a valid number"),
        ({"sampler": "swep"}, "there is no sampler 'swep'; did you mean 'sweep'\\?"),
        ({"sampler": "round_robin", "sampler_options": {"layers": [0]}}, "sampler round_robin has no option 'layers'"),
        ({"sampler": "weighted"}, "sampler weighted needs weights: a list, or the path of a JSON file"),
        ({"sampler_options": {"seed": 1}}, "sampler_options: seed is not an option, but a setting"),
        ({"sampler": "no_such_package:Sampler"}, "cannot be imported .*: install its package, or set PYTHONPATH"),
        (
            {"sampler": "lisatune.errors:UserError"},
            "is not a sampler: write a dataclass that inherits from lisatune.Sampler",
        ),
        ({"method": "lsia"}, "method='lsia': input should be 'lisa', 'fixed', 'badam', 'lora', 'full' or 'mezo'"),
        ({"method": "full", "num_active": 2}, "num_active has no effect with method=full"),
        ({"method": "lisa", "lora_r": 8}, "lora_r has no effect with method=lisa"),
        ({"vocabulary_blocks": True, "method": "lora"}, "vocabulary_blocks has no effect with method=lora"),
        (
            {"vocabulary_blocks": True, "train_embedding": False, "train_head": False},
            "no effect while embedding and head",
        ),
        ({"optimizer_in_backward": True}, "cannot clip by the global norm.*: set max_grad_norm=0"),
        (
            {"optimizer_in_backward": True, "max_grad_norm": 0, "gradient_accumulation_steps": 2},
            "cannot add up micro-batches",
        ),
        ({"activation_offloading": True}, "set gradient_checkpointing=true, or leave it out"),
        ({"recipe": "paper", "offload_frozen": True}, "offload_frozen needs gradient_checkpointing=true"),
        ({"offload_frozen": True, "method": "full"}, "offload_frozen has no effect with method=full"),
        ({"offload_frozen": True, "state_policy": "keep"}, "cannot go with state_policy=keep"),
        ({"recipe": "paper", "offload_optimizer": True, "device": "cpu"}, "offload_optimizer has no effect on a CPU"),
        (
            {"optim": "adam"},
            "optim='adam': input should be 'adamw', 'adamw_16bit', 'adamw_8bit', 'sign', 'factored', 'spectral', 'sgd', 'lars', 'lamb', 'adafactor' or 'muon'",
        ),
        ({"train_embedding": "often"}, "train_embedding"),
        ({"method": "mezo", "max_grad_norm": 1}, "max_grad_norm has no effect with method=mezo"),
        ({"method": "mezo", "gradient_checkpointing": True}, "gradient_checkpointing has no effect with method=mezo"),
        ({"method": "full", "mezo_epsilon": 1e-3}, "mezo_epsilon has no effect with method=full"),
        ({"method": "badam", "num_active": 0}, "num_active is 0"),
        ({"momentum": 0.9}, "momentum has no effect with optim=adamw"),
        ({"optim": "sgd", "adapt_vectors": True}, "adapt_vectors has no effect with optim=sgd"),
        ({"optim": "lamb", "vocabulary_blocks": True}, "vocabulary_blocks needs an optimizer that works on blocks"),
        (
            {"sampler": "gradient_norm", "optimizer_in_backward": True, "max_grad_norm": 0},
            "sampler=gradient_norm cannot go with optimizer_in_backward",
        ),
        (
            {"inverse_chance": True, "optimizer_in_backward": True, "max_grad_norm": 0},
            "inverse_chance cannot go with optimizer_in_backward",
        ),
        (
            {"on_bad_step": "skip", "optimizer_in_backward": True, "max_grad_norm": 0},
            "on_bad_step=skip cannot go with optimizer_in_backward",
        ),
        ({"frozen_learning_rate": 1, "gradient_accumulation_steps": 2}, "the next micro-batch would see other weights"),
        (
            {"frozen_learning_rate": 1, "on_bad_step": "skip"},
            "on_bad_step=skip cannot go with frozen_learning_rate",
        ),
        ({"eval_steps": 5}, "eval_steps has no effect without held-out rows"),
        ({"streaming": True}, "streaming needs max_steps"),
        ({"max_steps": 5, "num_train_epochs": 2}, "num_train_epochs has no effect with max_steps"),
        ({"max_steps": 5, "warmup_steps": 5}, "warmup_steps=5 must be smaller than max_steps=5"),
    ],
)
def test_mistakes_are_told_in_one_sentence(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        build_config(NEEDED | settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NEEDED)
def test_missing_names_say_how_to_give_them(name):
    with pytest.raises(UserError, match=f"^{name} is missing: give --{name}"):
        build_config({k: v for k, v in NEEDED.items() if k != name})


def test_overrides_win_over_the_file_and_keep_their_types(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: d\noutput: o\nlearning_rate: 5e-4\nseed: 1\n")
    config = build_config(read_settings(str(path), ["seed=2", "packing=true", "eval_data=null"]))
    assert (config.learning_rate, config.seed, config.packing, config.eval_data) == (5e-4, 2, True, None)


def test_written_config_builds_the_same_run(tmp_path):
    config = build_config(NEEDED | {"num_train_epochs": 2})
    write_config(config, tmp_path / "config.yaml")
    assert TrainConfig.model_validate(yaml.safe_load((tmp_path / "config.yaml").read_text())) == config


@pytest.mark.parametrize("method", ["lisa", "lora", "full"])
@pytest.mark.parametrize("length", [{"max_steps": 5}, {"num_train_epochs": 2.0}])
def test_config_yaml_of_a_run_repeats_it(tmp_path, method, length):
    config = build_config(NEEDED | {"method": method} | length)
    write_config(config, tmp_path / "config.yaml")
    assert build_config(read_settings(str(tmp_path / "config.yaml"), ["output=other"])).method == method


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: [", "line 2: not valid YAML|line 1: not valid YAML"),
        ("- a\n", "must hold 'name: value' lines"),
        ("x: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_bad_yaml(tmp_path, content, message):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        read_settings(str(tmp_path / "run.yaml"), [])


def test_bad_words():
    with pytest.raises(UserError, match="'seed' is not of the form key=value"):
        read_settings(None, ["seed"])
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_settings("nowhere.yaml", [])


def test_a_preset_is_lisa_with_other_settings_and_the_user_wins():
    needed = {"model": "m", "data": "d", "output": "o", "method": "badam"}
    badam = build_config(needed)
    assert (badam.sampler, badam.num_active, badam.train_embedding, badam.train_head) == ("sweep", 1, False, False)
    assert build_config(needed | {"num_active": 3, "sampler": "uniform"}).num_active == 3
    assert build_config(needed | {"method": "fixed"}).sampler == "fixed"


def test_a_written_config_of_every_method_can_be_read_again(tmp_path):
    for method in ("lisa", "fixed", "badam", "lora", "full", "mezo"):
        config = build_config({"model": "m", "data": "d", "output": "o", "method": method})
        write_config(config, tmp_path / "config.yaml")
        assert build_config(read_settings(str(tmp_path / "config.yaml"), [])) == config


def test_null_takes_a_setting_of_the_file_back(tmp_path):
    """A recipe's method can be changed: its LISA settings are taken back, and not refused."""
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\ndata: d\noutput: o\nnum_active: 3\ninterval_steps: 5\n")
    with pytest.raises(UserError, match="num_active has no effect with method=full"):
        build_config(read_settings(str(path), ["method=full"]))
    config = build_config(read_settings(str(path), ["method=full", "num_active=null", "interval_steps=null"]))
    assert config == build_config({"model": "m", "data": "d", "output": "o", "method": "full"})
    with pytest.raises(UserError, match="model is missing"):
        build_config(read_settings(str(path), ["model=null"]))


@pytest.mark.parametrize(
    ("given", "unit", "num_active", "interval_steps", "learning_rate"),
    [
        ({}, "slices", 1, 1, None),
        ({"learning_rate": 1e-3}, "slices", 1, 1, 1e-3),
        ({"recipe": "paper"}, "layers", 2, 20, None),
        ({"num_active": 4}, "layers", 4, 20, None),
        ({"interval_steps": 3}, "layers", 2, 3, None),
        ({"sampled_unit": "slices", "interval_steps": 3}, "slices", 1, 3, None),
        ({"method": "full"}, "layers", 2, 20, None),
    ],
)
def test_the_default_is_slices_and_gamma_or_k_mean_the_papers_layers(
    given, unit, num_active, interval_steps, learning_rate, tmp_path
):
    config = build_config(NEEDED | given)
    found = config.sampled_unit, config.num_active, config.interval_steps, config.learning_rate
    assert found == (unit, num_active, interval_steps, learning_rate)
    assert config.slices_of == ("columns" if unit == "slices" else "rows")
    write_config(config, tmp_path / "config.yaml")  # what a run leaves behind says it all
    assert build_config(read_settings(str(tmp_path / "config.yaml"), [])) == config


@pytest.mark.parametrize("lever", [{"frozen_bits": 8}, {"offload_frozen": True}])
def test_slices_of_columns_give_way_to_levers_that_need_rows(lever, tmp_path):
    config = build_config(NEEDED | {"gradient_checkpointing": True} | lever)
    assert config.slices_of == "rows"
    write_config(config, tmp_path / "config.yaml")
    assert build_config(read_settings(str(tmp_path / "config.yaml"), [])) == config
    with pytest.raises(UserError, match="slices_of=columns cannot go with"):
        build_config(NEEDED | {"gradient_checkpointing": True, "slices_of": "columns"} | lever)


def test_what_follows_from_other_settings_counts_as_left_out():
    """So it follows them again when a setting more is given, as the planner does."""
    config = build_config(NEEDED | {"seed": 1})
    assert config.slices_of == "columns"
    assert config.model_fields_set == {"model", "data", "output", "seed"}
    again = build_config(config.model_dump(exclude_unset=True) | {"frozen_bits": 4, "gradient_checkpointing": True})
    assert again.slices_of == "rows"
