import re
from pathlib import Path

import pytest
import torch

from lisatune import UserError
from lisatune.models.load import load_model, pick_device
from tiny import make_llama, make_tokenizer


def test_weights_load_in_the_type_asked_for(model_folder):
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = load_model(str(model_folder), dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux to tell whose memory it is")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_in_their_files_type_stay_in_the_file(tmp_path, dtype):
    """They are mapped, so the processes of a host share them; those of another type are each process' own."""
    make_llama(vocab_size=30000, hidden_size=512).to(torch.bfloat16).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    before = own_bytes()
    model, _ = load_model(str(tmp_path), dtype)
    size = sum(p.nbytes for p in model.parameters())
    assert sum(float(p.detach().sum()) for p in model.parameters()) != 0.0  # so all of it was read
    grown = own_bytes() - before
    assert grown < 0.2 * size if dtype == torch.bfloat16 else grown > 0.8 * size


def own_bytes():
    """Memory of this process that no other can share."""
    return 1024 * int(re.search(r"^Anonymous:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)[1])


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
