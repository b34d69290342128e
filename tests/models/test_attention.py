"""attn_implementation: transformers' names, and what is refused where."""

import io

import pytest
import torch
import transformers as hf
from rich.console import Console

from lisatune import UserError
from lisatune.assemble import make_task
from lisatune.models.attention import check_attention, set_attention
from lisatune.models.packed import PACKED
from lisatune.preferences.build import load
from lisatune.run.build import build
from lisatune.run.preflight import preflight
from lisatune.settings import build_config
from tiny import make_llama

CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_the_model_computes_by_the_name_and_says_the_same(name):
    model, ids = make_llama(), torch.arange(2, 18)[None]
    before = model(input_ids=ids).logits
    set_attention(model, name)
    assert model.config._attn_implementation == name
    assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-5)  # float32, sums in another order
    assert not any("attn_impl" in key for key in model.config.to_dict())  # it is not saved with the model


def test_runs_take_it(model_folder, data_file, tmp_path):
    given = {"model": str(model_folder), "data": str(data_file), "output": str(tmp_path / "run"), "eval_rows": 6}
    config = build_config(given | {"attn_implementation": "eager", "max_steps": 1})
    begun = build(config, *preflight(config), console=Console(file=io.StringIO()))
    assert begun.learner.model.config._attn_implementation == "eager"
    assert begun.plan.settings["attn_implementation"] == "eager"
    judged = config.model_copy(update={"task": "dpo", "dtype": "float32"})
    model, _, _ = load(judged, make_task(judged), Console(file=io.StringIO()))
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        ({}, PACKED),
        ({"method": "lora"}, PACKED),
        ({"attn_implementation": "sdpa"}, "sdpa"),
        ({"torch_compile": True, "recipe": "paper"}, "sdpa"),
    ],
)
def test_runs_with_packed_rows_take_the_one_without_a_mask_unless_told(model_folder, data_file, tmp_path, asked, taken):
    if "method" in asked:
        pytest.importorskip("peft", reason="the extra 'lora' is not installed")
    given = {"model": str(model_folder), "data": str(data_file), "output": str(tmp_path / "run"), "eval_rows": 6}
    config = build_config(given | {"packing": True, "max_steps": 1, "max_length": 64} | asked)
    begun = build(config, *preflight(config), console=Console(file=io.StringIO()))
    assert begun.learner.model.config._attn_implementation == taken
    assert not any("attn_impl" in key for key in begun.learner.model.config.to_dict())


@pytest.mark.parametrize(
    ("device", "dtype", "sentence"),
    [
        (torch.device("cpu"), "bfloat16", "needs an NVIDIA or AMD GPU"),
        (CUDA, "float32", "computes in 16 bits"),
        (CUDA, "bfloat16", "needs the package flash-attn or kernels: pip install kernels"),
    ],
)
def test_flash_attention_is_refused_where_it_cannot_work(device, dtype, sentence):
    with pytest.raises(UserError, match=f"^attn_implementation=flash_attention_2 {sentence}"):
        check_attention("flash_attention_2", device, dtype)


def test_a_model_with_an_attention_of_its_own_is_refused():
    config = hf.FalconConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = hf.FalconForCausalLM(config)
    with pytest.raises(UserError, match="^attn_implementation=eager: FalconForCausalLM has an attention of its own"):
        set_attention(model, "eager")
