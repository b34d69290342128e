import re
from pathlib import Path

import pytest
import torch
import transformers as hf

from lisatune import UserError, find_layers
from lisatune.models.load import load_model, pick_device
from lisatune.placement.base import OnDevice
from tiny import make_llama, make_tokenizer


def test_weights_load_in_the_type_asked_for(model_folder):
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = load_model(str(model_folder), dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux to tell whose memory it is")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_in_their_files_type_stay_in_the_file(tmp_path, dtype):
    """They are mapped, so the processes of a host share them; those of another type are each process' own."""
    make_llama(vocab_size=256).to(torch.bfloat16).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), dtype)
    assert {in_file(p) for p in model.parameters()} == {dtype == torch.bfloat16}


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux to tell whose memory it is")
def test_weights_of_another_type_are_converted_where_they_are_placed(tmp_path):
    """Until then they stay in the file; what comes of it are the bits of a model that is loaded in that type."""
    make_llama(vocab_size=256).to(torch.bfloat16).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    eager, _ = load_model(str(tmp_path), torch.float32)
    model, _ = load_model(str(tmp_path), torch.float32, as_stored=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(in_file(p) for p in model.parameters())
    placement = OnDevice()
    placement.place(model, find_layers(model), torch.device("cpu"), torch.float32)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), eager.parameters(), strict=True))
    assert model.config.to_dict() == eager.config.to_dict()
    buffers = zip(model.buffers(), eager.buffers(), strict=True)
    assert all(b.dtype == c.dtype and torch.equal(b, c) for b, c in buffers)


def test_a_model_that_keeps_some_weights_in_float32_is_loaded_in_its_types(tmp_path):
    settings = {
        "vocab_size": 256, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
        "first_k_dense_replace": 1,
    }  # fmt: skip
    hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**settings)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    models = [load_model(str(tmp_path), torch.bfloat16, as_stored=stored)[0] for stored in (False, True)]
    types = [{n: t.dtype for n, t in [*m.named_parameters(), *m.named_buffers()]} for m in models]
    assert types[0] == types[1]


def in_file(parameter):
    """Whether its memory is that of a file of weights, in which no page was copied by writing to it."""
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        start, stop = (int(end, 16) for end in mapping.split()[0].split("-"))
        if start <= parameter.data_ptr() < stop:
            copied = re.search(r"^Anonymous:\s+(\d+)", mapping, re.MULTILINE)[1]
            return mapping.partition("\n")[0].endswith(".safetensors") and copied == "0"
    raise AssertionError("no memory of this process")


def test_tokenizer_of_another_model_is_refused(tmp_path):
    make_llama(vocab_size=50).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="give a model with its own tokenizer"):
        load_model(str(tmp_path))


def test_device_that_is_not_there():
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("cuda:9", "toaster"):
        with pytest.raises(UserError, match="not available on this machine"):
            pick_device(name)
