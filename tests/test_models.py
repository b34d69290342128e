import pytest
import torch

from conftest import make_llama, make_tokenizer
from lisatune import UserError
from lisatune.models import load_model, pick_device


def test_weights_load_in_the_type_asked_for(model_folder):
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = load_model(str(model_folder), dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert all(p.requires_grad for p in model.parameters())


def test_tokenizer_of_another_model_is_refused(tmp_path):
    make_llama(vocab_size=50).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="they do not belong together"):
        load_model(str(tmp_path))


def test_device_that_is_not_there():
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("cuda:9", "toaster"):
        with pytest.raises(UserError, match="not to be had on this machine"):
            pick_device(name)
