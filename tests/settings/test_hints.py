"""Settings of other tools are answered with ours."""

import pytest

from lisatune import UserError
from lisatune.settings import TrainConfig, build_config
from lisatune.settings.hints import ADVICE, OUR_NAME, hint_for


def test_every_hint_names_a_setting_that_there_is_and_none_hides_one():
    assert all(name in TrainConfig.model_fields for ours in OUR_NAME.values() for name in ours.split(" or "))
    assert not {*OUR_NAME, *ADVICE} & TrainConfig.model_fields.keys()
    assert not OUR_NAME.keys() & ADVICE.keys()


@pytest.mark.parametrize(
    ("foreign", "ours"),
    [
        ("lisa_activated_layers", "num_active"),
        ("lisa_n_layers", "num_active"),
        ("lisa_step_interval", "interval_steps"),
        ("lisa_interval_steps", "interval_steps"),
        ("cutoff_len", "max_length"),
        ("max_seq_length", "max_length"),
        ("lr", "learning_rate"),
        ("bf16", "dtype"),
        ("model_name_or_path", "model"),
        ("output_dir", "output"),
        ("val_set_size", "eval_rows"),
        ("dataset_text_field", "columns"),
        ("device_map", "device"),
        ("flash_attn", "attn_implementation"),
    ],
)
def test_a_setting_of_another_tool_gets_our_name(foreign, ours):
    with pytest.raises(UserError, match=f"unknown setting '{foreign}'; its name here is '{ours}'"):
        build_config({"model": "m", "data": "d", "output": "o", foreign: 1})
    assert ours in hint_for("--" + foreign.replace("_", "-"))


def test_what_has_no_setting_is_answered_with_what_to_do():
    with pytest.raises(UserError, match="unknown setting 'load_in_4bit'; weights are trained whole"):
        build_config({"model": "m", "data": "d", "output": "o", "load_in_4bit": True})
