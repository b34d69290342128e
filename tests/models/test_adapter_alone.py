"""A LoRA run with ``save_merged=false`` leaves its adapters, and every command takes them as it takes a merged model."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from lisatune import UserError
from lisatune.cli import main
from lisatune.evaluation.tasks.before_after import find_target
from lisatune.models.export import export_delta, export_model
from lisatune.models.load import load_trained
from lisatune.models.names import check_model_name, model_of
from runs import metrics, run, weights

pytest.importorskip("peft", reason="the extra 'lora' is not installed")
LORA = {"method": "lora", "max_steps": 3}


@pytest.fixture(scope="module")
def runs(model_folder, tmp_path_factory):
    """Two runs that differ in what they save."""
    from tiny import write_rows

    folder = tmp_path_factory.mktemp("runs")
    rows = write_rows(folder / "rows.jsonl")
    run(model_folder, rows, folder / "merged", **LORA)
    run(model_folder, rows, folder / "alone", save_merged=False, **LORA)
    return folder


def test_only_the_adapters_are_saved_and_give_the_merged_model_to_the_bit(runs):
    alone = runs / "alone"
    assert not (alone / "model").exists()
    assert metrics(alone)[1:] == metrics(runs / "merged")[1:]
    assert (alone / "adapter" / "README.md").is_file()
    model, tokenizer = load_trained(str(alone))
    merged, theirs = load_trained(str(runs / "merged"))
    assert model.state_dict().keys() == merged.state_dict().keys()
    assert all(torch.equal(weight, merged.state_dict()[name]) for name, weight in model.state_dict().items())
    assert tokenizer.chat_template == theirs.chat_template is not None
    assert model.generation_config.eos_token_id == merged.generation_config.eos_token_id
    assert "fine-tuned with lisatune" in (alone / "adapter" / "README.md").read_text()


def test_export_chat_and_eval_take_it(runs, model_folder, tmp_path, monkeypatch, capsys):
    alone = str(runs / "alone")
    export_model(alone, tmp_path / "plain")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict()
    assert all(torch.equal(weight, exported[name]) for name, weight in weights(runs / "merged").items())
    told = export_delta(alone, tmp_path / "delta")
    assert 0 < told["tensors"] < told["of"]
    target = find_target(alone)
    assert (target.model, target.base) == (str(runs / "alone" / "adapter"), str(model_folder))
    answers = []
    for folder in ("alone", "merged"):
        monkeypatch.setattr(
            "sys.argv", ["lisatune", "chat", str(runs / folder), "--prompt", "Hi", "--max-new-tokens", "4"]
        )
        with pytest.raises(SystemExit, match="^0$"):
            main()
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_adapters_that_cannot_be_used_are_refused(runs, tmp_path):
    shutil.copytree(runs / "alone" / "adapter", tmp_path / "run" / "adapter")
    adapter = tmp_path / "run" / "adapter"
    assert model_of(str(tmp_path / "run")) == str(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "./gone"}))
    with pytest.raises(UserError, match=r"\./gone: no such model folder"):
        check_model_name(str(adapter))
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "XLORA"}))
    with pytest.raises(UserError, match="is of 'XLORA': only LoRA's adapters can be merged"):
        check_model_name(str(adapter))
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["q_proj"]}))
    with pytest.raises(UserError, match=r"its adapters do not fit .*adapter_config.json: it has no weight"):
        load_trained(str(adapter))
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="does not say what model the adapters belong to"):
        check_model_name(str(adapter))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="save the adapters as safetensors"):
        check_model_name(str(adapter))
