"""The same run on one process and on several: equal losses and weights, to rounding."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from lisatune.cli import main
from lisatune.data.loader import Batch
from lisatune.errors import UserError
from lisatune.plan.fake_processes import fake_processes
from lisatune.plan.forecast import plan_config, plan_run
from lisatune.settings import build_config, check_num_ranks
from lisatune.train import train
from peaks import WIDE
from places import HELPERS
from tiny import make_llama, make_tokenizer
from torchrun import torchrun
from ways import WAYS

# epsilon: Adam divides by the root of the second moment, so where a gradient is near 0 its rounding would become an update
COMMON = {
    "max_steps": 12, "learning_rate": 1e-2, "adam_epsilon": 1e-3, "max_length": 64, "eval_rows": 7, "save_steps": 100,
    "per_device_train_batch_size": 2,
}  # fmt: skip
LISA = {"num_active": 1, "interval_steps": 1}  # 12 draws


@pytest.fixture
def tmp_path(memory_path):
    return memory_path


def settings_of(way, num_ranks, shard_size, tmp_path, data_file, model_folder):
    """Of a way on so many processes; the rows of an optimizer step are the same whatever their number.

    53 rows to train on: an epoch ends with 5, which neither 2 nor 4 processes can share evenly.
    """
    lisa = LISA if "method" not in way.settings else {}
    model = {"model": str(tmp_path / "tied" if way.more.get("model") == "tied" else model_folder)}
    return COMMON | way.settings | lisa | way.more | model | {
        "data": str(data_file), "output": str(tmp_path / f"{way} {num_ranks} {shard_size}"),
        "dp_shard_size": shard_size, "gradient_accumulation_steps": 4 // num_ranks,
    }  # fmt: skip


def weights(folder):
    files = [*(folder / "model").glob("*.safetensors"), *(folder / "adapter").glob("*.safetensors")]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def compare(one, several, name, bound=2e-4):
    """Equal to rounding: sums are added up in another order, and Adam's steps carry that on."""
    for was, now in zip(rows(one), rows(several), strict=True):
        for key in ("loss", "eval_loss", "grad_norm"):
            same = pytest.approx(now.get(key, -1.0), rel=bound, abs=bound)
            assert was.get(key, -1.0) == same, f"{name}: {key} of {was['step']}"
        for key in ("active_layers", "sampled_parts", "labelled_tokens", "tokens", "learning_rate"):
            assert was.get(key) == now.get(key), f"{name}: {key} of {was['step']}"
    before, after = weights(one), weights(several)
    assert before.keys() == after.keys(), name
    for weight, tensor in before.items():
        far = (tensor.float() - after[weight].float()).abs()
        assert max(far.mean(), far.max() / 20) < bound, f"{name}: {weight} by {far.max():.2g}"


def mixture_of_experts(tmp_path, data_file, num_ranks, size):
    """A run on a model that holds its experts stacked, and stores them one by one."""
    folder = tmp_path / "mixture"
    if not folder.exists():
        config = MixtralConfig(vocab_size=len(make_tokenizer()), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                               num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)  # fmt: skip
        MixtralForCausalLM(config).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    return COMMON | LISA | {
        "max_steps": 3, "model": str(folder), "data": str(data_file), "output": str(tmp_path / f"mixture {num_ranks} {size}"),
        "dp_shard_size": size, "gradient_accumulation_steps": 4 // num_ranks if size > 1 else 4,
    }  # fmt: skip


def assert_loads_with_the_same_names(before, after):
    was, now = (
        {n: t.shape for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
        for folder in (before, after)
    )
    assert was == now
    assert any("experts.3.w1" in name for name in now)
    _, told = MixtralForCausalLM.from_pretrained(after, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_as_many_processes_train_as_one_does(model_folder, data_file, tmp_path, num_ranks):
    """Twelve draws, accumulation, uneven last batches, ranks with other numbers of labelled tokens; each mode and method."""
    make_llama(vocab_size=len(make_tokenizer()), tied=True).save_pretrained(tmp_path / "tied")
    make_tokenizer().save_pretrained(tmp_path / "tied")
    where = (tmp_path, data_file, model_folder)
    pairs = [(way, size) for way in WAYS for count, size in way.processes or () if count == num_ranks]
    several = {(way.name, size): settings_of(way, num_ranks, size, *where) for way, size in pairs}
    mixture = [mixture_of_experts(tmp_path, data_file, num_ranks, size) for size in (num_ranks, 1)]
    cases = tmp_path / "cases.json"
    cases.write_text(json.dumps([*several.values(), mixture[0]]))
    torchrun(num_ranks, HELPERS / "torchrun.py", cases)
    train(build_config(mixture[1]))
    compare(*(Path(run["output"]) for run in reversed(mixture)), "a mixture of experts")
    assert_loads_with_the_same_names(tmp_path / "mixture", Path(mixture[0]["output"]) / "model")
    for way, size in pairs:
        alone = settings_of(way, 1, 1, *where)
        one, many = Path(alone["output"]), Path(several[way.name, size]["output"])
        if not one.exists():
            train(build_config(alone))
        case = f"{way} in {num_ranks // size} copies of {size} shards"
        compare(one, many, case, 3e-2 if way.settings.get("dtype") == "bfloat16" else 2e-4)
        check_sent(case, way, size, num_ranks, many)
        if way.name == "LISA":
            alone, held = rows(one)[-1]["state_bytes"], rows(many)[-1]["state_bytes"]
            assert held == pytest.approx(alone / size, rel=0.01 if size > 1 else 0), case


def check_sent(case, way, shard_size, num_ranks, folder):
    """Bytes of gradients that travel: those of what trains, and no others."""
    sent = json.loads((folder / "sent.json").read_text())
    model = make_llama(vocab_size=len(make_tokenizer()))
    layer, everything = (sum(4 * p.numel() for p in of.parameters()) for of in (model.model.layers[0], model))
    trained = everything - 3 * layer
    planned = sum(rows(folder)[0]["plan"]["sent_bytes_of"].values())
    if not {"train_embedding", "sampled_unit"} & way.settings.keys():  # of which a forecast takes the largest draw
        most = max(step["sent"] for step in sent)  # the last batch of an epoch has fewer micro-batches
        assert most == pytest.approx(planned, abs=50), f"{case}: but a loss and a norm"
    for step in sent:
        if way.name == "LISA" and shard_size == 1:
            assert step["all_reduce"] == trained
            assert "all_gather" not in step
        if way.name == "LISA" and shard_size == num_ranks == 4:
            assert step["reduce_scatter"] == pytest.approx(trained, rel=0.01)  # 130 rows are filled up to 132
            assert "all_reduce" not in step
        if way.name == "LISA" and shard_size < num_ranks == 4:
            # the other pair of processes has the other copy; each adds up its half
            assert step["reduce_scatter"] == trained
            assert step["all_reduce"] == trained / 2
        if way.name == "slices" and shard_size == 1:  # each tensor has a third of its rows, to a row
            assert step["all_reduce"] == pytest.approx(everything / 3, rel=0.02)
            assert "all_gather" not in step
        if way.name == "full":
            assert step["all_reduce"] == everything
        assert step["small"] <= 3 * 4, "a loss and a norm, twice: nothing tells the others what was drawn"
    if way.name in ("slices", "slices of columns") and shard_size == num_ranks:  # each micro-batch brings its own
        most = {kind: max(step[kind] for step in sent) / (4 // num_ranks) for kind in sent[0]}
        in_rows = everything
        if way.name == "slices of columns":
            in_rows = 2 * 4 * model.lm_head.weight.numel()
            assert most["reduce_scatter"] == pytest.approx((everything - in_rows) / 3, rel=0.05), case
        assert most["all_reduce"] == pytest.approx(in_rows / 3, rel=0.03), case


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc to see Gloo's threads in")
@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_each_process_holds_what_the_forecast_says(tmp_path, num_ranks):
    """Against what PyTorch's allocator gave out on each rank, within 1%, as for one process; the real step under gloo."""
    lisa, shards = {"num_active": 1}, {"dp_shard_size": num_ranks}
    levers = {
        "vocabulary_blocks": True, "optim": "adamw_8bit", "frozen_bits": 4, "gradient_checkpointing": True,
        "optimizer_in_backward": True, "max_grad_norm": 0,
    }  # fmt: skip
    cases = [
        lisa, lisa | shards, lisa | levers, {"method": "full"}, {"method": "full"} | shards, {"method": "lora"} | shards,
        lisa | shards | {"gradient_checkpointing": True, "gradient_accumulation_steps": 3},
        lisa | {"dp_shard_size": 2},
        {"sampled_unit": "slices"} | shards, {"sampled_unit": "slices", "slices_of": "rows", "gradient_checkpointing": True} | shards,
    ]  # fmt: skip
    model_config = make_llama(**WIDE).config
    with fake_processes(num_ranks):
        plans = [plan_run(plan_config(case, "cpu"), model_config, "cpu", rows=4, tokens=128) for case in cases]
    file = tmp_path / "cases.json"
    file.write_text(json.dumps([{"settings": c, "drawn": p.drawn} for c, p in zip(cases, plans, strict=True)]))
    torchrun(num_ranks, HELPERS / "peak_of_ranks.py", file)
    for case, plan, held in zip(cases, plans, json.loads(file.read_text()), strict=True):
        assert len(held) == plan.num_ranks == num_ranks
        assert held == [pytest.approx(plan.peak_bytes, rel=0.01)] * num_ranks, case
    copies, sharded = plans[0], plans[1]
    for kind in ("weights", "state"):
        assert sharded.total(kind) == pytest.approx(copies.total(kind) / num_ranks, rel=0.01)
    assert (copies.total("gathered"), copies.sent_bytes_of["weights"]) == (0, 0)


def test_a_forecast_of_several_processes_on_the_command_line(model_folder, monkeypatch, capsys):
    """As many as nobody has here, on one process; and which lever is pulled first."""
    words = ["plan", "--model", str(model_folder), "--device", "cpu", "--json", "max_length=64", "recipe=paper"]
    monkeypatch.setattr("sys.argv", ["lisatune", *words, "--nproc", "8", "dp_shard_size=8"])
    with pytest.raises(SystemExit, match="^0$"):
        main()
    of_each = json.loads(capsys.readouterr().out)["plans"]
    assert [plan["method"] for plan in of_each] == ["lisa", "lora", "full"]
    assert {plan["num_ranks"] for plan in of_each} == {8}
    lisa, _, full = (plan["sent_bytes_of"] for plan in of_each)
    assert lisa["weights"] == full["weights"] > 0
    assert lisa["gradients"] < full["gradients"]
    assert not torch.distributed.is_initialized()

    monkeypatch.setattr("sys.argv", ["lisatune", *words, "--nproc", "3", "--gpu-memory", "1MiB", "--method", "lisa"])
    with pytest.raises(SystemExit, match="^0$"):
        main()
    first, second, *_ = json.loads(capsys.readouterr().out)["levers"]
    assert (first["lever"], second["lever"]) == ("", "dp_shard_size=3")
    assert second["plan"]["peak_bytes"] < first["plan"]["peak_bytes"]

    monkeypatch.setattr("sys.argv", ["lisatune", *words, "--nproc", "8", "dp_shard_size=3"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "dp_shard_size=3 does not divide the 8 processes" in capsys.readouterr().err


@pytest.mark.parametrize("shard_size", [1, 2])
def test_sums_in_bfloat16_send_half(shard_size):
    case = {"num_active": 1, "dtype": "bfloat16", "dp_shard_size": shard_size}
    with fake_processes(2):
        sent = [
            plan_run(plan_config(case | more, "cpu"), make_llama().config, "cpu", rows=2, tokens=8).sent_bytes_of
            for more in ({}, {"reduce_dtype": "auto"})
        ]
    assert sent[0]["weights"] == sent[1]["weights"]
    assert sent[0]["gradients"] == pytest.approx(2 * sent[1]["gradients"], rel=0.001)  # and a loss and a norm


LAYERS = LISA | {"interval_steps": 3}
IN_SLICES = {"sampled_unit": "slices", "train_norms": True}


@pytest.mark.parametrize(
    ("shard_size", "unit"),
    [(1, LAYERS), *(pytest.param(2, unit, marks=pytest.mark.slow) for unit in (LAYERS, IN_SLICES))],
)
def test_a_killed_process_is_replaced_and_the_run_ends_as_if_nothing_had_happened(
    model_folder, data_file, tmp_path, shard_size, unit
):
    """torchrun starts all anew; to the bit on as many processes, to rounding on another number."""
    levers = {
        "optim": "adamw_8bit", "vocabulary_blocks": True, "frozen_bits": 8, "gradient_checkpointing": True,
        "sampler": "gradient_norm", "state_policy": "reset_all", "norm_steps": 2,
    }  # fmt: skip
    run = COMMON | unit | {"model": str(model_folder), "data": str(data_file), "dp_shard_size": shard_size}
    run |= {"max_steps": 8, "save_steps": 3, "gradient_accumulation_steps": 2}
    straight, killed = ({"output": str(tmp_path / name)} for name in ("straight", "killed"))
    cases = tmp_path / "cases.json"
    best = (
        run
        | ({"samples": "What is 1 plus 1?"} if shard_size == 1 else {})
        | {"keep_best": True, "eval_steps": 1, "learning_rate": 1.0, "output": str(tmp_path / "best")}
    )
    straight, killed = (of | (levers if shard_size == 1 else {}) for of in (straight, killed))
    with fake_processes(2):
        plan = plan_run(plan_config(run, "cpu"), make_llama().config, "cpu", tokens=64)
    fitted = run | {"output": str(tmp_path / "fitted"), "max_steps": 1, "memory_bytes": plan.peak_bytes * 9 // 10}
    fitted.pop("dp_shard_size")  # what is set stays
    fitted = [fitted] if shard_size == 1 else []
    cases.write_text(json.dumps([run | straight, best, run | killed | {"deadly_step": 4}, *fitted]))
    torchrun(2, HELPERS / "torchrun.py", cases, options=["--max-restarts=1"])
    assert Path(f"{cases}.killed").exists()
    before, after = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    assert all(torch.equal(before[name], after[name]) for name in before)
    told = [
        [{k: row.get(k) for k in ("step", "loss", "grad_norm")} for row in rows(tmp_path / n)]
        for n in ("straight", "killed")
    ]
    assert told[0] == told[1]
    files = [path.name for path in (tmp_path / "straight" / "checkpoints" / "checkpoint-6").iterdir()]
    assert any(name.endswith("-rank1.safetensors") for name in files) == (shard_size > 1)
    if shard_size == 1:
        norms = [(tmp_path / name / "norms.jsonl").read_text() for name in ("straight", "killed")]
        assert norms[0] == norms[1] != ""
        answers = (tmp_path / "best" / "samples.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in answers] == list(range(9)), "one process writes them"
        sent = [step["sent"] for step in json.loads((tmp_path / "killed" / "sent.json").read_text())]
        planned = rows(tmp_path / "killed")[0]["plan"]["sent_bytes_of"]["gradients"]
        assert max(sent) == pytest.approx(planned, abs=50), "the vocabulary's gradients twice"
        assert "dp_shard_size: 2" in (tmp_path / "fitted" / "config.yaml").read_text(), "the first lever is enough"
    check_best(tmp_path / "best")
    for left in ("model", "summary.json"):
        path = tmp_path / "killed" / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    alone = run | killed | {"gradient_accumulation_steps": 4, "dp_shard_size": 1, "save_steps": 7}
    train(build_config(alone), resume=True, allow_changes=True)
    compare(tmp_path / "straight", tmp_path / "killed", "on one process")


def check_best(folder):
    """The trained model is that of the best step: its checkpoint has the same weights."""
    losses = {row["step"]: row["eval_loss"] for row in rows(folder)[1:]}
    best = json.loads((folder / "summary.json").read_text())["best_step"]
    assert best == min(losses, key=losses.__getitem__) < 8
    trained, checkpoint = weights(folder), folder / "checkpoints" / f"checkpoint-{best}"
    shards = [load_file(path) for path in sorted(checkpoint.glob("weights-norm*.safetensors"))]
    name = "model.norm.weight"
    assert torch.equal(trained[name], torch.cat([shard[name] for shard in shards if name in shard]))
    assert {path.name for path in checkpoint.parent.iterdir()} >= {f"checkpoint-{best}", "checkpoint-8"}


def command(tmp_path, model_folder, data_file, *words):
    """`lisatune train` on two processes, one of which is given `words` beside."""
    script = tmp_path / "one_differs.py"
    script.write_text(
        "import os, sys\n"
        "from lisatune.cli import main\n"
        f"if os.environ['RANK'] == '1': sys.argv += {list(words)!r}\n"
        "sys.argv[0] = 'lisatune'\n"
        "main()\n"
    )
    settings = COMMON | LISA | {"model": model_folder, "data": data_file, "output": tmp_path / "run", "max_steps": 500}
    return [script, "train", *(f"{name}={value}" for name, value in settings.items())]


def test_ranks_that_were_given_different_things_stop_at_the_start(model_folder, data_file, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(data_file.read_text().replace("What", "Who"))
    for word, sentence in {
        "learning_rate=0.5": "the processes have different input: learning_rate is 0.5 on rank 1, but 0.01 on rank 0;",
        f"data={other}": "the processes have different input: the train data is 60 documents of 3,",
        "data=nowhere.jsonl": "lisatune: on rank 1 of 2: nowhere.jsonl",
    }.items():
        words = command(tmp_path, model_folder, data_file, word)
        told = torchrun(2, *[str(w).replace("eval_rows=7", "eval_rows=0") for w in words], check=False)
        assert sentence in told, told
        assert told.count("lisatune: ") == 1, told
        assert "exitcode  : 2" in told
        assert not (tmp_path / "run").exists()


def test_what_needs_whole_weights_is_refused_in_shards(monkeypatch):
    def settings(**some):
        return build_config({"model": "m", "data": "d", "output": "o"} | some)

    for some in ({"method": "mezo"}, {"optim": "muon"}, {"sampler": "gradient_norm"}, {"frozen_learning_rate": 1e-3}):
        check_num_ranks(settings(**some), 2)
        with pytest.raises(UserError, match=f"{next(iter(some))}=.* needs whole weights in each process"):
            check_num_ranks(settings(**some).model_copy(update={"dp_shard_size": 2}), 2)
    task = {"task": "dpo", "optim": "adamw_8bit"}
    with pytest.raises(UserError, match="optim=adamw_8bit works on one process only with task=dpo"):
        check_num_ranks(settings(**task), 2)
    with pytest.raises(UserError, match="reduce_dtype has no effect on one process"):
        check_num_ranks(settings(reduce_dtype="auto"), 1)
    with pytest.raises(UserError, match="dp_shard_size=3 does not divide the 4 processes"):
        check_num_ranks(settings(dp_shard_size=3, recipe="paper"), 4)
    with pytest.raises(
        UserError, match="dp_shard_size=2 needs 2 processes, and one was started: start them with torchrun"
    ):
        check_num_ranks(settings(dp_shard_size=2, recipe="paper"), 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["lisatune", "plan"])
    with pytest.raises(SystemExit, match="2"):
        main()


def test_a_signal_to_one_process_stops_all_after_the_same_step(model_folder, data_file, tmp_path):
    script = tmp_path / "signalled.py"
    script.write_text(
        "import os, signal, sys\n"
        "from lisatune.cli import main\n"
        "from lisatune.run.build import Run\n"
        f"sys.path.append({str(HELPERS)!r})\n"
        "from steps import before_each_step\n"
        "def interrupt(step):\n"
        "    if step == 3 and os.environ['RANK'] == '1': signal.raise_signal(signal.SIGTERM)\n"
        "Run.batches = before_each_step(interrupt)\n"
        "main()\n"
    )
    told = torchrun(2, script, *command(tmp_path, model_folder, data_file)[1:], check=False)
    assert "stopped after step 4 of 500" in told, told
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-4" / "manifest.json").exists()


@given(num_rows=st.integers(1, 9), num_ranks=st.integers(1, 5))
def test_shares_hold_every_row_once_and_are_equally_long(num_rows, num_ranks):
    ids = torch.arange(1, num_rows + 1)[:, None].repeat(1, 3)
    batch = Batch(ids, ids.clone(), torch.arange(3).repeat(num_rows, 1), torch.ones_like(ids, dtype=torch.bool))
    shares = [batch.share(rank, num_ranks) for rank in range(num_ranks)]
    assert {len(share.input_ids) for share in shares} == {-(-num_rows // num_ranks)}
    assert sum(share.num_labelled for share in shares) == batch.num_labelled
    assert sorted(x for s in shares for x in s.input_ids[:, 0].tolist() if x) == list(range(1, num_rows + 1))
