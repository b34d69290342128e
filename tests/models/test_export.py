"""What was trained, as others load it."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lisatune import UserError
from lisatune.common.programs import program
from lisatune.models.export import export_delta, export_model
from lisatune.models.gguf import export_gguf
from lisatune.models.llama_cpp import QUANTISER, find_tools
from lisatune.models.load import load_model
from lisatune.settings import build_config
from lisatune.train import train
from places import LLAMA_CPP, SHARED

with_converter = pytest.mark.skipif(not LLAMA_CPP.exists(), reason="no llama.cpp: LLAMA_CPP=DIR, or make .venv/.dev")
IDS = torch.tensor([[1, 5, 9, 30, 7, 2]])


@pytest.fixture
def run(model_folder, data_file, tmp_path):
    """LISA with one draw of one layer of four, so that three layers are as they were."""
    return trained(model_folder, data_file, tmp_path, "run")


def trained(model_folder, data_file, tmp_path, name, **settings):
    usual = {"max_steps": 2, "learning_rate": 1e-2, "max_length": 64, "per_device_train_batch_size": 4}
    usual |= {"num_active": 1, "interval_steps": 2} if settings.get("method", "lisa") == "lisa" else {}
    folder = tmp_path / name
    train(build_config(usual | {"model": str(model_folder), "data": str(data_file), "output": str(folder)} | settings))
    return folder


def logits(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(input_ids=IDS).logits


def test_a_plain_folder_gives_the_same_logits(run, tmp_path):
    told = export_model(str(run), tmp_path / "plain")
    assert torch.equal(logits(tmp_path / "plain"), logits(run / "model"))
    assert told["bytes"] == sum(w.nbytes for w in load_file(tmp_path / "plain" / "model.safetensors").values())
    AutoTokenizer.from_pretrained(tmp_path / "plain")


def test_the_model_card_goes_along_but_no_file_that_a_link_leads_to(run, tmp_path):
    card = run / "model" / "README.md"
    written = card.read_bytes()
    export_model(str(run), tmp_path / "plain")
    export_delta(str(run), tmp_path / "delta")
    export_model(str(tmp_path / "delta"), tmp_path / "again")
    for name in ("plain", "delta", "again"):
        assert (tmp_path / name / "README.md").read_bytes() == written
    card.unlink()
    (tmp_path / "secret").write_text("secret")
    card.symlink_to(tmp_path / "secret")
    export_model(str(run), tmp_path / "without")
    assert not (tmp_path / "without" / "README.md").exists()


def test_dtype_is_that_asked_for_and_otherwise_that_of_the_run(model_folder, data_file, tmp_path):
    run = trained(model_folder, data_file, tmp_path, "run", dtype="bfloat16")
    for name, dtype, expected in (("as-is", None, torch.bfloat16), ("half", "float16", torch.float16)):
        export_model(str(run), tmp_path / name, dtype)
        assert {w.dtype for w in load_file(tmp_path / name / "model.safetensors").values()} == {expected}


def test_a_delta_holds_what_changed_and_makes_the_model_again_to_the_bit(run, model_folder, tmp_path):
    told = export_delta(str(run), tmp_path / "delta")
    changed = load_file(tmp_path / "delta" / "delta.safetensors")
    layers = {name.split(".")[2] for name in changed if ".layers." in name}
    assert len(layers) == 1
    assert not any(
        torch.equal(weight, load_model(str(model_folder))[0].state_dict()[n]) for n, weight in changed.items()
    )
    assert told["tensors"] == len(changed) < told["of"]
    export_model(str(tmp_path / "delta"), tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (run / "model", tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_delta_of_another_base_is_refused(run, model_folder, tmp_path):
    export_delta(str(run), tmp_path / "delta")
    weights = load_file(model_folder / "model.safetensors")
    frozen = next(
        n for n in weights if n.split(".")[2:3] and n not in load_file(tmp_path / "delta" / "delta.safetensors")
    )
    weights[frozen][0] += 1
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    about = json.loads((tmp_path / "delta" / "delta.json").read_text())
    (tmp_path / "delta" / "delta.json").write_text(json.dumps(about | {"base": str(other)}))
    with pytest.raises(UserError, match="has changed since the delta was made"):
        export_model(str(tmp_path / "delta"), tmp_path / "again")
    (tmp_path / "delta" / "delta.json").write_text("{")
    with pytest.raises(UserError, match="is not a delta"):
        export_model(str(tmp_path / "delta"), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_adapters_are_merged(model_folder, data_file, tmp_path):
    pytest.importorskip("peft")
    run = trained(model_folder, data_file, tmp_path, "run", method="lora")
    export_model(str(run), tmp_path / "plain")
    assert torch.equal(logits(tmp_path / "plain"), logits(run / "model"))
    assert not any("lora" in name for name in load_file(tmp_path / "plain" / "model.safetensors"))


@with_converter
@pytest.mark.skipif(not (SHARED / "models").exists(), reason="no ../shared/models beside the checkout")
@pytest.mark.parametrize("kind", [pytest.param("f32", marks=pytest.mark.slow), "q8_0"])
def test_gguf_is_read_back(tmp_path, kind):
    pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
    source = SHARED / "models/stories15M/hf"
    export_gguf(str(source), tmp_path / "model.gguf", kind, llama_cpp=LLAMA_CPP)
    again, _ = load_model(str(tmp_path / "model.gguf"))
    there = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    weights = dict(again.named_parameters())
    assert weights.keys() == dict(there.named_parameters()).keys()
    for name, weight in there.named_parameters():  # 8 bits are within 1/254 of a block's largest weight
        assert (weights[name] - weight).norm() <= (0 if kind == "f32" else 0.01) * weight.norm(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.Modelfile", "model.gguf"]


@with_converter
@pytest.mark.skipif(not (SHARED / "models").exists(), reason="no ../shared/models beside the checkout")
@pytest.mark.parametrize(("kind", "bound"), [("f32", 5e-4), ("q8_0", 0.03)])
def test_llama_cpp_says_the_same(tmp_path, kind, bound):
    """Its own kernels and tokenizer: keys and values have 16 bits there, and with q8_0 activations 8."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    source = SHARED / "models/stories15M/hf"
    export_gguf(str(source), tmp_path / "model.gguf", kind, llama_cpp=LLAMA_CPP)
    model, tokenizer = load_model(str(source))
    text = "Once upon a time, there was a little girl who had a red ball."
    ids = tokenizer(text)["input_ids"]
    llama = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=128, logits_all=True, verbose=False)
    assert llama.tokenize(text.encode()) == ids
    llama.eval(ids)
    with torch.no_grad():
        ours = model.eval()(input_ids=torch.tensor([ids])).logits[0]
    theirs = torch.tensor(llama.scores[: len(ids)])
    assert (theirs - ours).norm() <= bound * ours.norm()


@with_converter
@pytest.mark.skipif(program(QUANTISER, LLAMA_CPP) is None, reason="LLAMA_CPP has no llama-quantize: build it")
@pytest.mark.skipif(not (SHARED / "models").exists(), reason="no ../shared/models beside the checkout")
def test_a_quantised_file_is_smaller_and_read_back(tmp_path):
    pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
    source = SHARED / "models/stories15M/hf"
    told = export_gguf(str(source), tmp_path / "model.gguf", "Q4_K_M", llama_cpp=LLAMA_CPP)
    assert told["quantiser"] == program(QUANTISER, LLAMA_CPP)
    there = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert told["bytes"] < 1.2 * there.num_parameters()  # widths of 288 fall back from 4 to 5 and 8 bits a weight
    weights = dict(load_model(str(tmp_path / "model.gguf"))[0].named_parameters())
    for name, weight in there.named_parameters():
        assert (weights[name] - weight).norm() <= 0.1 * weight.norm(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.Modelfile", "model.gguf"]


@pytest.mark.parametrize(
    ("kind", "folder", "said"),
    [
        ("q4_k_m", "whole", "llama-quantize, which is neither built in --llama-cpp nor on PATH"),
        ("q8_0", "empty", "the folder has no convert_hf_to_gguf.py: give a checkout"),
        ("q8_0", None, "not on PATH: git clone"),
        ("q4", "whole", "q8_0, q3_k_m, q4_0, q4_k_s, q4_k_m"),
    ],
)
def test_llama_cpps_tools_that_are_not_there_are_named(tmp_path, monkeypatch, kind, folder, said):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "empty").mkdir()
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "convert_hf_to_gguf.py").touch()
    with pytest.raises(UserError, match=said):
        find_tools(kind, None if folder is None else tmp_path / folder)


@with_converter
def test_what_the_converter_does_not_know_is_told(model_folder, tmp_path):
    with pytest.raises(UserError, match="converter cannot write it as GGUF"):
        export_gguf(
            str(model_folder), tmp_path / "model.gguf", "f32", llama_cpp=LLAMA_CPP
        )  # its tokenizer is of no known kind
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["./no-such-run", "x"], "no such model"),
        (["RUN", "RUN"], "exists already"),
        (["RUN", "no/such/x"], "is not a folder"),
        (["MODEL", "x", "--delta"], "holds no run"),
        (["RUN", "x", "--delta", "--gguf", "f16"], "cannot go together"),
        (["RUN", "x.gguf", "--gguf", "q3"], "choose one of f32"),
        (["RUN", "x", "--dtype", "int8"], "choose float32"),
        (["RUN", "x", "--gguf", "f16", "--push-to", "a/b"], "leave out --gguf"),
        (["RUN", "x", "--push-to", "a/b"], "the upload to the hub failed"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(run, model_folder, tmp_path, words, said):
    words = [{"RUN": str(run), "MODEL": str(model_folder)}.get(word, word) for word in words]
    done = subprocess.run(
        [sys.executable, "-m", "lisatune", "export", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
