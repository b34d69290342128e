"""Whole runs on tiny models, and what their folders hold."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lisatune import UserError
from lisatune.common.loss_names import loss_lines
from lisatune.models.load import load_model
from lisatune.optim.build import clip_gradients
from lisatune.optim.schedules import ONE_OF, SCHEDULES
from lisatune.run.schedule import make_schedule
from lisatune.settings import build_config
from runs import run as shared_run
from tiny import make_llama, make_tokenizer


def run(model_folder, data_file, output, **settings):
    """As the shared ``run``, shorter."""
    shorter = {"max_steps": 12, "per_device_train_batch_size": 4}
    if settings.get("method", "lisa") == "lisa":
        shorter["interval_steps"] = 3
    return shared_run(model_folder, data_file, output, **(shorter | settings))


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trained(folder):
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("method", ["lisa", "lora", "full"])
def test_every_method_learns_and_saves_what_from_pretrained_loads(model_folder, data_file, tmp_path, method):
    if method == "lora":
        pytest.importorskip("peft", reason="the extra 'lora' is not installed")
    _, said = run(model_folder, data_file, tmp_path / "run", method=method)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert all(torch.equal(model.state_dict()[name], w) for name, w in trained(tmp_path / "run").items())
    assert "4 decoder layers at model.layers" in said
    assert "predicted peak" in said
    assert (tmp_path / "run" / "adapter").exists() == (method == "lora")


def test_files_of_a_run(model_folder, data_file, tmp_path):
    summary, _ = run(model_folder, data_file, tmp_path / "run", eval_steps=5)
    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} >= {"config.yaml", "metrics.jsonl", "summary.json", "model"}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["num_active"], config["interval_steps"], config["weight_decay"]) == (2, 3, 0.0)
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(13))
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 5, 10, 12]
    plan = rows[0]["plan"]
    assert plan["num_trained"] < plan["num_parameters"]
    assert rows[0]["layers"].startswith("LlamaForCausalLM: 4 decoder layers")
    # the plan counts two moments; the optimizer holds a step counter of 4 bytes beside them for each parameter
    planned = sum(plan["bytes_of"][f"state/{part}"] for part in ("decoder", "embedding", "head"))
    assert 0 < rows[-1]["state_bytes"] - planned < 4 * 40
    assert summary["planned_peak_bytes"] == plan["peak_bytes"] > 0
    needed = {"loss", "learning_rate", "grad_norm", "active_layers", "labelled_tokens", "step_seconds", "peak_bytes"}
    assert all(needed <= row.keys() for row in rows[1:])
    sets = [tuple(row["active_layers"]) for row in rows[1:]]
    assert all(sets[i] == sets[i - i % 3] for i in range(12))
    assert json.loads((folder / "summary.json").read_text()) == summary


def test_same_config_and_seed_give_the_same_weights_to_the_bit(model_folder, data_file, tmp_path):
    for name, more in [("a", {}), ("b", {}), ("evaluated", {"eval_steps": 1}), ("other", {"seed": 1})]:
        run(model_folder, data_file, tmp_path / name, **more)
    a, b, evaluated, other = (trained(tmp_path / name) for name in ("a", "b", "evaluated", "other"))
    assert all(torch.equal(a[name], b[name]) and torch.equal(a[name], evaluated[name]) for name in a)
    assert any(not torch.equal(a[name], other[name]) for name in a)


def test_all_layers_active_equals_full_fine_tuning_to_the_bit(model_folder, data_file, tmp_path):
    run(model_folder, data_file, tmp_path / "lisa", num_active=4, interval_steps=2)
    run(model_folder, data_file, tmp_path / "full", method="full")
    lisa, full = trained(tmp_path / "lisa"), trained(tmp_path / "full")
    assert all(torch.equal(lisa[name], full[name]) for name in full)


def test_loss_has_one_divisor_per_step(model_folder, data_file, tmp_path):
    """Micro-batches of unequal numbers of labelled tokens make the step of one batch; to rounding, 1e-5 of the loss."""
    run(model_folder, data_file, tmp_path / "one", per_device_train_batch_size=8, max_steps=6)
    run(
        model_folder,
        data_file,
        tmp_path / "four",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=6,
    )
    for a, b in zip(metrics(tmp_path / "one")[1:], metrics(tmp_path / "four")[1:], strict=True):
        assert a["labelled_tokens"] == b["labelled_tokens"]
        assert a["active_layers"] == b["active_layers"]
        # Adam divides by the root of tiny squares, so rounding grows a little with each step
        assert abs(a["loss"] - b["loss"]) < 1e-4 * a["loss"]


def test_a_lever_for_a_gpu_is_refused_on_a_cpu_that_auto_chose(model_folder, data_file, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("auto takes the GPU that is here")
    with pytest.raises(UserError, match="offload_optimizer has no effect on a CPU"):
        run(model_folder, data_file, tmp_path / "run", offload_optimizer=True)
    assert not (tmp_path / "run").exists()


def test_bfloat16_run_holds_what_it_says(model_folder, data_file, tmp_path):
    _summary, said = run(model_folder, data_file, tmp_path / "run", dtype="bfloat16", max_steps=3)
    assert "weights and gradients bfloat16, optimizer state 32 bits" in said
    assert {w.dtype for w in trained(tmp_path / "run").values()} == {torch.bfloat16}


def test_epochs_count_every_row(model_folder, data_file, tmp_path):
    summary, _ = run(model_folder, data_file, tmp_path / "run", max_steps=None, num_train_epochs=2, eval_rows=0)
    assert summary["steps"] == 2 * 60 / 4
    assert summary["eval_loss_before"] is None


def test_streaming_reads_the_same_rows(model_folder, data_file, tmp_path):
    summary, said = run(
        model_folder, data_file, tmp_path / "run", streaming=True, eval_rows=None, eval_data=str(data_file)
    )
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert "rows are read as they are needed" in said


def test_text_rows_continue_pre_training(model_folder, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "%s"}\n' % ("abcdefgh " * 30) * 4)
    summary, _said = run(
        model_folder, tmp_path / "text.jsonl", tmp_path / "run", packing=True, eval_rows=1, max_length=32
    )
    assert summary["eval_loss_after"] < summary["eval_loss_before"]


def test_held_out_sets_with_names_are_told_apart(model_folder, data_file, tmp_path):
    """Continual pre-training: what is learned, and what may be forgotten."""
    files = {}
    for name, words in {"near": "abcdefgh ", "far": "zyxwvuts "}.items():
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text(json.dumps({"text": words * 30}) + "\n")
    named = {name: str(file) for name, file in files.items()}
    summary, said = run(model_folder, files["near"], tmp_path / "run", eval_data=named, eval_rows=0, max_length=32)
    assert summary["eval_loss_after"] == summary["eval_near_loss_after"] < summary["eval_near_loss_before"] - 0.5
    assert summary["eval_far_loss_after"] > summary["eval_near_loss_after"] + 0.5
    assert "held out, far" in said
    alone, _ = run(model_folder, files["near"], tmp_path / "far", eval_data=named["far"], eval_rows=0, max_length=32)
    assert alone["eval_loss_after"] == summary["eval_far_loss_after"]  # the same loss as if it were the only set
    first, last = metrics(tmp_path / "run")[0], metrics(tmp_path / "run")[-1]
    assert first["eval_far_loss"] == summary["eval_far_loss_before"]
    assert last["eval_loss"] == last["eval_near_loss"] == summary["eval_loss_after"]
    lines = dict(loss_lines(summary))
    assert list(lines) == ["held-out loss, near", "held-out loss, far"]
    assert lines["held-out loss, far"].startswith(f"{summary['eval_far_loss_before']:.4f} -> ")
    with pytest.raises(UserError, match="no.rows.jsonl"):
        run(model_folder, files["near"], tmp_path / "no", eval_data={"near": "no.rows.jsonl"}, eval_rows=0)
    with pytest.raises(UserError, match="a b.*must be one word"):
        run(model_folder, files["near"], tmp_path / "no", eval_data={"a b": named["far"]}, eval_rows=0)


def test_tied_heads_are_saved_once_and_load_equal(data_file, tmp_path):
    model = make_llama(vocab_size=len(make_tokenizer()), tied=True)
    model.save_pretrained(tmp_path / "tied")
    make_tokenizer().save_pretrained(tmp_path / "tied")
    run(tmp_path / "tied", data_file, tmp_path / "run")
    assert "lm_head.weight" not in trained(tmp_path / "run")
    loaded, _ = load_model(str(tmp_path / "run" / "model"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, trained(tmp_path / "run")["model.embed_tokens.weight"])


def test_nothing_labelled_is_no_silent_run_on_no_tokens(model_folder, data_file, tmp_path):
    with pytest.raises(UserError, match="no row holds anything to learn within max_length=8"):
        run(model_folder, data_file, tmp_path / "run", max_length=8)
    assert not (tmp_path / "run").exists()


def test_loss_that_is_not_finite_stops_the_run(data_file, tmp_path):
    model = make_llama(vocab_size=len(make_tokenizer()))
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    make_tokenizer().save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match="step 1: the loss is nan"):
        run(tmp_path / "nan", data_file, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def test_packing_is_refused_where_documents_would_mix(data_file, tmp_path):
    """Falcon with ALiBi knows no position ids, so the second document would see the first."""
    import transformers as hf

    tokenizer = make_tokenizer()
    settings = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = hf.FalconForCausalLM(hf.FalconConfig(**settings, alibi=True, bos_token_id=1, eos_token_id=2))
    model.save_pretrained(tmp_path / "falcon")
    tokenizer.save_pretrained(tmp_path / "falcon")
    with pytest.raises(UserError, match="packing=true: FalconForCausalLM would mix packed documents"):
        run(tmp_path / "falcon", data_file, tmp_path / "run", packing=True, num_active=1)


ARGUMENTS = {
    "cosine": {"num_cycles": 1.5}, "cosine_with_restarts": {"num_cycles": 3}, "polynomial": {"power": 2, "lr_end": "1e-4"},
    "inverse_sqrt": {"timescale": 7}, "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 5, "decay_type": "linear"},
}  # fmt: skip


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("warmup", [{}, {"warmup_steps": 4}, {"warmup_ratio": 0.17}])
def test_learning_rates_are_those_of_transformers(kind, warmup):
    """Equal to the bit, with arguments and without, in any order of the steps."""
    from transformers import get_scheduler

    for arguments in [{}, ARGUMENTS.get(kind, {})][kind in ONE_OF :]:
        given = {"lr_scheduler_type": kind, "learning_rate": 0.1, "lr_scheduler_kwargs": arguments, **warmup}
        rate_at = make_schedule(build_config({"model": "m", "data": "d", "output": "o"} | given), 20)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        name = "constant_with_warmup" if kind == "constant" else kind
        numbers = {name: float(v) if name == "lr_end" else v for name, v in arguments.items()}
        scheduler, rates = get_scheduler(name, optimizer, 4 if warmup else 0, 20, numbers), []
        for _ in range(20):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert [rate_at(step) for step in reversed(range(20))] == rates[::-1]


def test_schedules_and_their_arguments_are_those_of_transformers():
    from inspect import signature

    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    of_all = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    theirs = {kind.value: set(signature(make).parameters) - of_all for kind, make in TYPE_TO_SCHEDULER_FUNCTION.items()}
    del theirs["reduce_lr_on_plateau"], theirs["greedy"]  # no functions of the step
    assert theirs == {name: set(arguments) for name, arguments in SCHEDULES.items()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycle": 2}}, "leave 'num_cycle' out; did you mean"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type=cosine_with_min_lr needs min_lr or min_lr_rate"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "needs num_decay_steps: give lr_scheduler_kwargs="),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type='reduce_lr_on_plateau': input should be 'linear'"),
        ({"warmup_steps": 0.03}, "warmup_steps=0.03: give whole steps, or warmup_ratio=0.03 for a share"),
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "warmup_ratio has no effect with warmup_steps: give one of them"),
    ],
)  # fmt: skip
def test_schedules_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        build_config({"model": "m", "data": "d", "output": "o"} | settings)


def test_an_argument_of_a_wrong_kind_is_refused_before_the_model_is_loaded(data_file, tmp_path):
    some = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "much"}}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"lr_scheduler_kwargs=.* does not fit lr_scheduler_type=polynomial"):
        run(tmp_path / "model", data_file, tmp_path / "run", **some)


def test_clipping_is_by_the_global_norm():
    model, reference = make_llama(), make_llama()
    for m in (model, reference):
        m(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer = torch.optim.SGD(model.parameters())
    norm = clip_gradients(optimizer, 0.5)
    assert norm == torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    before = [p.grad.clone() for p in model.parameters()]
    clip_gradients(optimizer, 0)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))


def test_weight_decay_touches_no_frozen_weight(model_folder, data_file, tmp_path):
    """Every layer changes over the run, and in each interval only those that were drawn may."""
    run(model_folder, data_file, tmp_path / "run", weight_decay=0.5, num_active=1, interval_steps=12)
    (active,) = metrics(tmp_path / "run")[1]["active_layers"]
    before, after = load_file(Path(model_folder) / "model.safetensors"), trained(tmp_path / "run")
    for name in before:
        if name.startswith("model.layers."):
            assert torch.equal(before[name], after[name]) == (int(name.split(".")[2]) != active), name


@pytest.mark.slow
def test_real_model_learns_real_data(shared, tmp_path):
    summary, _ = run(
        shared / "models/stories260K/hf", shared / "data/alpaca/alpaca.jsonl.gz", tmp_path / "run",
        learning_rate=1e-3, max_length=96, eval_rows=50, max_steps=40,
    )  # fmt: skip
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 0.3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_embedding_and_head_can_be_frozen(model_folder, data_file, tmp_path, checkpointing):
    more = {"train_embedding": False, "train_head": False, "gradient_checkpointing": checkpointing}
    run(model_folder, data_file, tmp_path / "run", **more)
    before, after = load_file(Path(model_folder) / "model.safetensors"), trained(tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "model.norm.weight" in changed
    assert not changed & {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("options", [{}, {"sampler_options": {"layers": [0, 3]}}], ids=["drawn once", "named"])
def test_fixed_trains_the_same_layers_in_every_step(model_folder, data_file, tmp_path, options):
    run(model_folder, data_file, tmp_path / "run", method="fixed", num_active=1, interval_steps=3, **options)
    (active,) = {tuple(row["active_layers"]) for row in metrics(tmp_path / "run")[1:]}
    assert active == (0, 3) or not options
    before, after = load_file(Path(model_folder) / "model.safetensors"), trained(tmp_path / "run")
    for name in before:
        if name.startswith("model.layers."):
            assert torch.equal(before[name], after[name]) == (int(name.split(".")[2]) not in active), name


def test_badam_sweeps_over_all_layers_and_leaves_embedding_and_head(model_folder, data_file, tmp_path):
    run(model_folder, data_file, tmp_path / "run", method="badam", interval_steps=2)
    before, after = load_file(Path(model_folder) / "model.safetensors"), trained(tmp_path / "run")
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert {row["active_layers"][0] for row in metrics(tmp_path / "run")[1:]} == {0, 1, 2, 3}
