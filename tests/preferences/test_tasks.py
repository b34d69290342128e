"""``task=dpo|kto|orpo|reward``: whole runs through TRL, stopped and resumed, their folders, and what is refused."""

import gc
import io
import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lisatune import UserError, plan_memory
from lisatune.compare.grid import make_grid
from lisatune.compare.results import read_run
from lisatune.errors import Stopped
from lisatune.memory.measure import allocated_peak, tensor_bytes
from lisatune.models.load import load_model
from lisatune.run.preflight import preflight
from lisatune.settings import build_config
from lisatune.train import train
from peaks import WIDE
from runs import metrics
from tiny import make_llama, make_tokenizer
from torchrun import torchrun

pytest.importorskip("trl", reason="the extra 'sft' is not installed")
from lisatune.preferences.build import build_task, quiet_trl
from lisatune.preferences.journal import TaskJournal
from lisatune.preferences.resume import newest

TASKS = ("dpo", "kto", "orpo", "reward")
STEPS, STOPPED_AFTER = 7, 4
pytestmark = pytest.mark.filterwarnings("default")  # TRL warns of its own coming changes


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and rows of both kinds."""
    folder = tmp_path_factory.mktemp("tasks")
    tokenizer = make_tokenizer()
    for name, model in {"model": make_llama(vocab_size=len(tokenizer)), "wide": make_llama(**WIDE)}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    pairs = [{"prompt": f"{i}?", "chosen": f"It is {i}.", "rejected": "No no.", "score": 1} for i in range(20)]
    write(folder / "pairs.jsonl", pairs)
    judged = [
        {"prompt": f"{i}?", "completion": "No." if i % 2 else f"It is {i}.", "label": i % 2 == 0} for i in range(20)
    ]
    write(folder / "judged.jsonl", judged)
    return folder


def settings(folder, task, output, **more):
    data = "judged.jsonl" if task == "kto" else "pairs.jsonl"
    given = {
        "task": task, "model": str(folder / "model"), "data": str(folder / data), "output": str(folder / output),
        "max_steps": STEPS, "learning_rate": 1e-2, "max_length": 64, "per_device_train_batch_size": 2, "eval_rows": 4,
        "eval_steps": 3,
    }  # fmt: skip
    if more.get("method", "lisa") == "lisa" and "sampled_unit" not in more:
        given |= {"num_active": 1, "interval_steps": 3}
    return given | more


def run(folder, task, output, resume=False, **more):
    console = Console(file=io.StringIO(), width=500)
    summary = train(build_config(settings(folder, task, output, **more)), console=console, resume=resume)
    return summary, console.file.getvalue()


@pytest.fixture(scope="module", params=TASKS)
def straight(request, folder):
    """A run never stopped: its task, folder, summary and what it told."""
    summary, told = run(folder, request.param, f"straight-{request.param}")
    return request.param, folder / f"straight-{request.param}", summary, told


@pytest.fixture
def stop_in_mid_interval(monkeypatch):
    """A real SIGTERM comes as that step begins."""
    begin = TaskJournal.on_step_begin

    def stopped(self, args, state, control, **kwargs):
        if state.global_step + 1 == STOPPED_AFTER:
            signal.raise_signal(signal.SIGTERM)
        begin(self, args, state, control, **kwargs)

    monkeypatch.setattr(TaskJournal, "on_step_begin", stopped)
    return monkeypatch.undo


def test_a_run_learns_and_leaves_what_a_run_leaves(straight, folder):
    task, output, summary, told = straight
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 0.02
    assert {"model", "config.yaml", "metrics.jsonl", "summary.json", "report.html"} <= {
        p.name for p in output.iterdir()
    }
    assert f"task={task}" in (output / "report.html").read_text()
    first, *lines = metrics(output)
    assert first["eval_loss"] == summary["eval_loss_before"]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6, STEPS]
    assert sum(line["tokens"] for line in lines) == summary["tokens"] > 0
    assert all(len(line["active_layers"]) == 1 and line["state_bytes"] > 0 for line in lines)
    assert "16 of 16 rows are used" in told
    assert ("left out: score" in told) == (task != "kto")
    found = read_run(output)
    assert found.loss == summary["eval_loss_after"]
    assert found.tokens_per_second > 0


def test_a_stopped_run_is_resumed_to_the_bit(straight, folder, stop_in_mid_interval):
    task, output, *_ = straight
    name = f"resumed-{task}"
    with pytest.raises(Stopped, match=f"stopped after step {STOPPED_AFTER} of {STEPS}"):
        run(folder, task, name)
    stop_in_mid_interval()
    with pytest.raises(UserError, match=r"began differently: .*seed=1 \(was 0\)"):
        run(folder, task, name, resume=True, seed=1)
    _, told = run(folder, task, name, resume=True)
    assert f"going on after step {STOPPED_AFTER} of {STEPS}" in told
    weights, expected = (load_file(f / "model" / "model.safetensors") for f in (folder / name, output))
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert metrics(folder / name) == metrics(output)


def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path):
    states = {
        1: "{}",
        2: json.dumps({"stateful_callbacks": {"TaskJournal": {"attributes": {"tokens": 5}}}}),
        3: "{cut off",
    }
    for step, text in states.items():
        (tmp_path / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    console = Console(file=io.StringIO(), width=500)
    step, standing = newest(tmp_path, console)
    assert (step, standing.tokens) == (2, 5)
    assert "checkpoint-3 is damaged; skipped, and removed" in console.file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"method": "lora"},
        {"method": "full", "optim": "adamw_8bit", "gradient_checkpointing": 2, "precompute_ref_log_probs": True},
    ],
    ids=str,
)
def test_other_methods_are_resumed_to_the_bit_too(more, folder, stop_in_mid_interval):
    pytest.importorskip("peft", reason="the extra 'lora' is not installed")
    name = more["method"]
    with pytest.raises(Stopped):
        run(folder, "dpo", f"{name}-stopped", **more)
    stop_in_mid_interval()
    summary, _ = run(folder, "dpo", f"{name}-stopped", resume=True, **more)
    run(folder, "dpo", name, **more)
    weights, expected = (load_file(folder / f / "model" / "model.safetensors") for f in (f"{name}-stopped", name))
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert (folder / name / "adapter").is_dir() == (name == "lora")


def test_the_trained_models_stand_where_a_run_s_model_stands(straight):
    task, output, *_ = straight
    if task == "reward":
        with pytest.raises(UserError, match="is a LlamaForSequenceClassification, which does not generate text"):
            load_model(str(output / "model"))
        return
    model, tokenizer = load_model(str(output / "model"))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert "### " in tokenizer.chat_template


@pytest.mark.parametrize(
    ("task", "more"),
    [("dpo", {}), ("dpo", {"precompute_ref_log_probs": True}), ("dpo", {"method": "lora"}), ("kto", {}), ("orpo", {}),
     ("reward", {"sampler": "fixed", "sampler_options": {"layers": [2]}})],
    ids=str,
)  # fmt: skip
def test_the_forecast_is_what_the_allocator_gives_out(task, more, folder):
    """Within 0.2%: 0.05% were seen."""
    rows = [{"prompt": "x" * 30, "chosen": "y" * 60, "rejected": "z" * 60} for _ in range(8)]
    if task == "kto":
        rows = [{"prompt": "x" * 30, "completion": "y" * 60, "label": i % 2 == 0} for i in range(8)]
    data = write(folder / "even.jsonl", rows)
    own = {
        "model": str(folder / "wide"),
        "data": data,
        "eval_rows": 0,
        "eval_steps": None,
        "max_length": 256,
        "max_steps": 2,
    }
    config = build_config(settings(folder, task, "forecast", **own, **more))
    built = build_task(config, *preflight(config), console=Console(file=io.StringIO()))
    reference = getattr(built.trainer, "ref_model", None)
    models = [built.trainer.model, *([reference] if reference is not None else [])]
    held = sum(tensor_bytes([*model.parameters(), *model.buffers()]) for model in models)
    gc.collect()  # what is freed while the profiler looks would be taken off
    with quiet_trl():
        peak = held + allocated_peak(built.trainer.train)
    assert built.plan.peak_bytes == pytest.approx(peak, rel=0.002)
    assert (built.plan.bytes_of["reference"] > 0) == (reference is not None)
    assert built.plan.tokens < config.max_length


def test_a_margin_is_of_all_rows_or_of_none(folder):
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"} | ({"margin": 1.0} if i else {}) for i in range(4)]
    data = write(folder / "margin.jsonl", rows)
    with pytest.raises(UserError, match="line 1: 'margin' is missing, but other rows have one"):
        run(folder, "reward", "margin", data=data, eval_rows=0, eval_steps=None)


def test_rows_without_room_for_an_answer_are_told(folder):
    def told(max_length):
        config = build_config(settings(folder, "reward", "long", max_length=max_length, eval_rows=0, eval_steps=None))
        console = Console(file=io.StringIO(), width=500)
        build_task(config, *preflight(config), console=console)
        return console.file.getvalue()

    assert "10 of 20 rows are used; 10 are longer than max_length" in told(40)
    with pytest.raises(UserError, match="no row is within max_length"):
        told(8)


@pytest.mark.parametrize("tied", [False, True])
def test_slices_of_a_head_that_trl_reads_by_itself_train(tied, folder):
    """TRL multiplies by the head's weight, past its forward: a step changes the rows of one block, of every matrix."""
    model = make_llama(vocab_size=len(make_tokenizer()), tied=tied)
    model.save_pretrained(folder / f"sliced-{tied}")
    make_tokenizer().save_pretrained(folder / f"sliced-{tied}")
    own = {
        "sampled_unit": "slices",
        "slices_of": "rows",
        "num_slices": 5,
        "max_steps": 1,
        "eval_steps": None,
        "eval_rows": 0,
    }
    run(folder, "dpo", f"slices-{tied}", model=str(folder / f"sliced-{tied}"), **own)
    weights = load_file(folder / f"slices-{tied}" / "model" / "model.safetensors")
    for name, before in model.named_parameters():
        rows = int((weights[name] != before).flatten(1).any(1).sum()) if before.ndim == 2 else 0
        assert rows <= -(-len(before) // 5)
        assert rows > 0 or before.ndim < 2 or "embed" in name  # of which few rows occur


def test_without_trl_it_is_said_what_to_install(folder, monkeypatch):
    for name in ("trl", "trl.kernels"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"task=dpo needs the package trl: pip install 'lisatune\[sft\]'"):
        run(folder, "dpo", "without")
    with pytest.raises(UserError, match=r"a forecast of a preference task needs the package trl: pip install"):
        plan_memory(make_llama().config, task="dpo", max_length=8, device="cpu")


def test_a_comparison_takes_the_rate_of_the_task(folder, tmp_path):
    given = {"model": "m", "data": "d", "task": "dpo", "eval_rows": 4, "max_steps": 5, "method": ["lisa", "lora"]}
    grid = make_grid(given | {"precompute_ref_log_probs": True}, tmp_path)
    assert [trial.config.learning_rate for trial in grid.trials] == [1e-6, 1e-6]
    assert [trial.config.precompute_ref_log_probs for trial in grid.trials] == [True, False]
    with pytest.raises(UserError, match="task has several values"):
        make_grid(given | {"task": ["dpo", "orpo"]}, tmp_path)


OF_TWO = {
    "dpo": {"task": "dpo"},
    "kto": {"task": "kto", "precompute_ref_log_probs": True},
    "orpo": {"task": "orpo"},
    "reward": {"task": "reward"},
    "LoRA": {"task": "dpo", "method": "lora"},
}


def on_processes(folder, name, num_processes, **more):
    """A case with the same rows in each step, whatever the number of processes: 16 rows, 4 a step, 7 steps."""
    given = settings(folder, output=f"{name} {num_processes}", **(OF_TWO[name] | more))
    return given | {"adam_epsilon": 1e-3, "gradient_accumulation_steps": 2 // num_processes}


@pytest.fixture(scope="module")
def two(folder):
    """All runs on two processes, from one start of them: straight ones, one that a signal stops, and its end."""
    pytest.importorskip("peft", reason="the extra 'lora' is not installed")
    stopped = on_processes(folder, "dpo", 2) | {"output": str(folder / "dpo stopped"), "stopped_after": STOPPED_AFTER}
    resumed = stopped | {"resume": True, "stopped_after": None}
    none = on_processes(folder, "reward", 2, eval_rows=0, eval_steps=None, max_length=8)
    none["output"] = str(folder / "no row")
    cases = [*(on_processes(folder, name, 2) for name in OF_TWO), stopped, resumed, none]
    (folder / "cases.json").write_text(json.dumps(cases))
    torchrun(2, Path(__file__).parent / "tasks_in_processes.py", folder / "cases.json")
    return folder


def weights_of(folder, name):
    return load_file(folder / name / "model" / "model.safetensors")


@pytest.mark.parametrize("name", OF_TWO)
def test_two_processes_train_as_one_does(name, two):
    train(build_config(on_processes(two, name, 1)), console=Console(file=io.StringIO()))
    alone, together = weights_of(two, f"{name} 1"), weights_of(two, f"{name} 2")
    # sums in another order; TRL averages KTO's estimate of the divergence over the processes, so that its loss is another
    bound = 1e-3 if name == "kto" else 2e-6
    for weight, value in alone.items():
        torch.testing.assert_close(value, together[weight], atol=bound, rtol=0, msg=lambda text: f"{name}: {text}")
    for one, several in zip(metrics(two / f"{name} 1"), metrics(two / f"{name} 2"), strict=True):
        same = {"tokens", "active_layers", "learning_rate"} & one.keys()
        assert {key: one[key] for key in same} == {key: several[key] for key in same}
        near = {"loss", "eval_loss", "grad_norm"} & one.keys()
        assert {key: one[key] for key in near} == pytest.approx(
            {key: several[key] for key in near}, rel=0.05 if name == "kto" else 1e-4
        )


def test_a_signal_to_one_of_two_processes_stops_both_and_they_go_on_to_the_bit(two):
    told = (two / "dpo stopped.told").read_text()
    assert f"stopped after step {STOPPED_AFTER} of {STEPS}" in told
    assert f"going on after step {STOPPED_AFTER} of {STEPS}" in told
    straight, resumed = weights_of(two, "dpo 2"), weights_of(two, "dpo stopped")
    assert all(torch.equal(value, resumed[weight]) for weight, value in straight.items())
    assert metrics(two / "dpo stopped") == metrics(two / "dpo 2")


def test_a_mistake_ends_both_processes_with_its_sentence(two):
    assert "no row is within max_length" in (two / "no row.told").read_text()


def test_the_forecast_of_several_processes_has_what_they_reserve_and_send(two):
    config = make_llama(**WIDE).config
    held = {}
    for method in ("lisa", "full"):
        own = {"task": "dpo", "method": method, "max_length": 64, "device": "cpu", "dtype": "float32"}
        one, four = (plan_memory(config, nproc=number, **own) for number in (1, 4))
        held[method] = four.total("gradients") - one.total("gradients")
        assert four.sent_bytes_of == {"weights": 0, "gradients": 2 * 4 * one.num_trained * 3 // 4}
    assert held == {"lisa": 0, "full": 4 * one.num_parameters}
