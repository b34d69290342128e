"""What people's data and models do to a whole run: told before it begins, or kept with it afterwards."""

import json
from datetime import date
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

from chat_templates import CHATML, DATED, make_tokenizer
from lisatune import UserError
from lisatune.common.loss_names import ending_lines
from lisatune.models.chat import Chat
from lisatune.models.export import export_model
from lisatune.models.load import end_tokens, load_trained
from lisatune.run.preflight import preflight
from lisatune.settings import build_config, read_settings
from lisatune.train import train
from tiny import make_llama

VOCABULARY = 260  # bytes, and four marks


def save(folder, tokenizer, model=None):
    model = model or make_llama(vocab_size=VOCABULARY, bos_token_id=256, eos_token_id=257, pad_token_id=257)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chatml(tmp_path):
    return save(tmp_path / "chatml", make_tokenizer(CHATML))


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rows(tmp_path):
    return rows_file(tmp_path / "rows.jsonl", [{"prompt": f"{i}?", "completion": f"{i}."} for i in range(6)])


def settings(model, data, tmp_path, **options):
    options = {"max_length": 64, "max_steps": 1, "num_active": 1, "device": "cpu"} | options
    return {
        "model": str(model),
        "data": data if isinstance(data, list) else str(data),
        "output": str(tmp_path / "run"),
    } | options


def run(model, data, tmp_path, *, resume=False, **options):
    """Trains, and returns the summary and what was told."""
    console = Console(file=StringIO(), width=1000)
    summary = train(build_config(settings(model, data, tmp_path, **options)), console=console, resume=resume)
    return summary, console.file.getvalue()


def test_the_token_that_ends_answers_is_kept_where_generation_stops(chatml, rows, tmp_path):
    _, told = run(chatml, rows, tmp_path)
    assert "train: " in told
    assert "6 rows read, 6 used" in told
    saved = GenerationConfig.from_pretrained(tmp_path / "run" / "model").eos_token_id
    end = make_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert saved == [257, end]
    model, tokenizer = load_trained(str(tmp_path / "run"))
    assert end_tokens(model, tokenizer) == [257, end]
    stops = {}
    model.generate = lambda **options: stops.update(options) or options["input_ids"]
    Chat(model, tokenizer).ask("1?")
    assert stops["eos_token_id"] == [257, end]
    exported = export_model(str(tmp_path / "run"), tmp_path / "exported")["output"]
    assert GenerationConfig.from_pretrained(exported).eos_token_id == [257, end]


def test_a_run_on_text_alone_has_no_chat_template(tmp_path):
    model = save(tmp_path / "base", make_tokenizer(None, adds_bos=True))
    data = rows_file(tmp_path / "rows.jsonl", [{"text": ""}, {"text": "Once upon a time."}])
    _, told = run(model, data, tmp_path)
    assert "1 refused (1: blank text)" in told
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").chat_template is None
    trained, tokenizer = load_trained(str(tmp_path / "run"))
    asked = {}
    trained.generate = lambda **options: asked.update(options) or options["input_ids"]
    Chat(trained, tokenizer).ask("Once")
    assert tokenizer.decode(asked["input_ids"][0]) == "<s>Once"


def test_the_template_that_was_asked_for_is_saved_with_the_model(chatml, rows, tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    run(chatml, rows, tmp_path, chat_template=str(own))
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").chat_template == own.read_text()
    with pytest.raises(
        UserError, match="chat_template=none.jinja: no such template, and no file .*; give one of chatml, plain"
    ):
        run(chatml, rows, tmp_path / "other", chat_template="none.jinja")


def test_the_day_that_a_template_wrote_is_kept_with_the_run(rows, tmp_path):
    model = save(tmp_path / "dated", make_tokenizer(DATED))
    run(model, rows, tmp_path)
    path = tmp_path / "run" / "config.yaml"
    assert read_settings(str(path), [])["template_date"] == date.today().isoformat()
    from lisatune.run.resume import with_date_of_before

    path.write_text(path.read_text().replace(date.today().isoformat(), "2020-02-03"))
    resumed = with_date_of_before(build_config(settings(model, rows, tmp_path)))
    assert resumed.template_date == "2020-02-03"


CODE = {
    "configuration_mine.py": "from transformers import LlamaConfig\n\n\nclass MineConfig(LlamaConfig):\n    model_type = 'mine'\n",
    "modeling_mine.py": "from transformers import LlamaForCausalLM\n\nfrom .configuration_mine import MineConfig\n\n\n"
    "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n",
}


@pytest.mark.parametrize("own_config", [True, False])
def test_a_model_with_code_of_its_own_is_used_after_training(own_config, chatml, rows, tmp_path):
    auto = {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    auto |= {"AutoConfig": "configuration_mine.MineConfig"} if own_config else {}
    for name, text in CODE.items():
        (chatml / name).write_text(text if own_config else text.replace("from .configuration_mine import MineConfig", "")
                                   .replace("    config_class = MineConfig\n", "    pass\n"))  # fmt: skip
    config = json.loads((chatml / "config.json").read_text()) | {"architectures": ["MineForCausalLM"], "auto_map": auto}
    config |= {"model_type": "mine"} if own_config else {}
    (chatml / "config.json").write_text(json.dumps(config))
    run(chatml, rows, tmp_path, trust_remote_code=True)
    for name in ("run", "run/model"):
        model, _ = load_trained(str(tmp_path / name))
        assert type(model).__name__ == "MineForCausalLM"
    exported = export_model(str(tmp_path / "run"), tmp_path / "exported")["output"]
    assert (tmp_path / "exported" / "modeling_mine.py").is_file()
    model, _ = load_trained(exported, trust_remote_code=True)
    assert type(model).__name__ == "MineForCausalLM"


def test_a_bad_row_of_a_stream_leaves_a_checkpoint(chatml, tmp_path):
    rows = [{"question": f"q{i}?", "answer": f"a{i}" if i != 1500 else None} for i in range(1600)]
    data = rows_file(tmp_path / "rows.jsonl", rows)
    options = {"streaming": True, "max_steps": 20, "per_device_train_batch_size": 128}
    with pytest.raises(
        UserError, match=r"line 1501: 'answer' is missing or null.*; stopped after step (\d) of 20, with a checkpoint"
    ):
        run(chatml, data, tmp_path, **options)
    assert list((tmp_path / "run" / "checkpoints").glob("*"))
    summary, told = run(chatml, data, tmp_path, resume=True, on_bad_row="skip", **options)
    assert "going on after step" in told
    assert summary["steps"] == 20
    assert "a bad row" in told
    assert "line 1501" in told


GPTQ = {"bits": 4, "group_size": 128, "damp_percent": 0.1, "desc_act": True, "sym": True, "true_sequential": True}
AWQ = {"quant_method": "awq", "zero_point": True, "group_size": 128, "bits": 4, "version": "gemm"}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("settings_of_model", "told"),
    [
        ("nf4", "quantization_config: bitsandbytes, 4 bits"),  # as bitsandbytes 0.50.2 and transformers wrote it
        ("int8", "quantization_config: bitsandbytes, 8 bits"),
        (
            {"quantization_config": {"load_in_8bit": True}},
            "quantization_config: bitsandbytes, 8 bits",
        ),  # by earlier versions
        ({"quantization_config": GPTQ | {"quant_method": "gptq"}}, "quantization_config: gptq, 4 bits"),
        ({"quantization_config": AWQ}, "quantization_config: awq, 4 bits"),
        ({"quantization_config": FP8}, "quantization_config: fp8"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config: mxfp4"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quantization_config: compressed-tensors"),
        ({"text_config": {"quantization_config": AWQ}}, "quantization_config: awq, 4 bits"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization: unknown, 4 bits"),  # MLX
    ],
)
def test_quantised_weights_are_refused_by_what_config_json_says(settings_of_model, told, chatml, rows, tmp_path):
    config = json.loads((chatml / "config.json").read_text())
    if isinstance(settings_of_model, str):
        settings_of_model = json.loads((Path(__file__).parent / "quantised" / f"{settings_of_model}.json").read_text())
    (chatml / "config.json").write_text(json.dumps(config | settings_of_model))
    (chatml / "model.safetensors").unlink()  # nothing but config.json is looked at
    match = rf"its weights are quantised \(config.json says {told}\), so they cannot be trained"
    with pytest.raises(UserError, match=match):
        preflight(build_config(settings(chatml, rows, tmp_path)))
    with pytest.raises(UserError, match=match):
        load_trained(str(chatml))


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_weights_that_an_earlier_tool_quantised_are_known_by_its_file(name, chatml, rows, tmp_path):
    (chatml / name).write_text(json.dumps(GPTQ))
    with pytest.raises(
        UserError, match=rf"its weights are quantised \(the folder has a {name}\), so they cannot be trained"
    ):
        preflight(build_config(settings(chatml, rows, tmp_path)))


def test_positions_shorter_than_max_length_are_refused_before_anything_is_loaded(rows, tmp_path):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=48, n_embd=32, n_layer=2, n_head=2))
    model = save(tmp_path / "gpt2", make_tokenizer(), gpt2)
    with pytest.raises(
        UserError, match=r"max_length=64 is more than the model's context of 48 tokens .*: set max_length=48"
    ):
        preflight(build_config(settings(model, rows, tmp_path)))
    summary, _ = run(model, rows, tmp_path, max_length=48)
    assert summary["steps"] == 1


def test_a_tokenizer_longer_than_the_embedding_trains_on_rows_that_do_not_need_it(rows, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"])
    model = save(tmp_path / "longer", tokenizer)
    run(model, rows, tmp_path)
    bad = rows_file(tmp_path / "bad.jsonl", [{"prompt": "<image>?", "completion": "A cat."}])
    with pytest.raises(UserError, match="line 1: holds the token '<image>'"):
        run(model, bad, tmp_path / "other")
    loaded, tokenizer = load_trained(str(tmp_path / "run"))
    with pytest.raises(UserError, match="no embedding for the token '<image>'"):
        Chat(loaded, tokenizer).ask("<image>")


def test_the_share_that_was_drawn_is_reported(chatml, tmp_path):
    parts = []
    for name, number, share in [("a", 40, 0.75), ("b", 30, 0.25)]:
        path = rows_file(
            tmp_path / f"{name}.jsonl", [{"prompt": f"{name}?", "completion": f"{i % 10}"} for i in range(number)]
        )
        parts.append({"path": str(path), "share": share})
    summary, told = run(chatml, parts, tmp_path, max_steps=None, num_train_epochs=1, per_device_train_batch_size=4)
    assert {name[-7:]: round(share, 2) for name, share in summary["data_shares"].items()} == {
        "a.jsonl": 0.75,
        "b.jsonl": 0.25,
    }
    assert "40 of its 40 rows in an epoch, 75.5% of all" in told or "13 of its 30 rows in an epoch" in told
    assert "tokens drawn: " in told


def test_a_store_trains_to_the_same_bits_as_rows_in_memory(chatml, rows, tmp_path):
    options = {"max_steps": 3, "eval_rows": 2, "per_device_train_batch_size": 2, "dataset_num_proc": 1}
    run(chatml, rows, tmp_path / "memory", **options)
    (tmp_path / "disk").mkdir()
    run(chatml, rows, tmp_path / "disk", dataset_prepared_path=str(tmp_path / "stores"), **options)
    one, other = (load_trained(str(tmp_path / name / "run"))[0].state_dict() for name in ("memory", "disk"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_padding_is_counted_and_told(chatml, tmp_path):
    """Of prompts of 1 to 40 letters; told if it is much."""
    some = [{"prompt": "a" * (1 + 13 * i % 40), "completion": "b"} for i in range(20)]
    data = rows_file(tmp_path / "rows.jsonl", some)
    shares = {}
    for name, options in {"plain": {}, "grouped": {"group_by_length": True}}.items():
        (tmp_path / name).mkdir()
        summary, _ = run(
            chatml, data, tmp_path / name, max_steps=None, num_train_epochs=1, per_device_train_batch_size=2, eval_rows=0,
            gradient_accumulation_steps=2, **options,
        )  # fmt: skip
        shares[name] = summary["padding_share"]
    assert 0.1 < shares["plain"] < 0.6
    assert shares["grouped"] < 0.5 * shares["plain"]
    told = dict(ending_lines(summary | {"padding_share": 0.34}))["padding"]
    assert told == "34% of what was computed; lisatune data shows what packing or group_by_length would save"
    assert "padding" not in dict(ending_lines(summary))
