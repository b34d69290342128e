"""What is recorded of layers is what it says, and recording it changes nothing."""

import io
import json
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from lisatune import UserError, find_layers
from lisatune.methods.lora import add_adapters
from lisatune.models.load import load_model
from lisatune.pieces import split_layers
from lisatune.run.build import build
from lisatune.run.checkpoint import Checkpoints
from lisatune.run.preflight import preflight
from lisatune.run.progress import Progress
from lisatune.run.schedule import make_schedule, seed_step, set_learning_rate
from lisatune.run.snapshot import Snapshots
from lisatune.settings import build_config, used_settings, write_config
from lisatune.study import start_weights
from lisatune.study.matrix_rank import effective_rank, product_norm, product_singular_values, stable_rank
from lisatune.study.recorder import NormRecorder
from tiny import make_llama, make_tokenizer
from weight_norms import MeanWeightNorms

PAPER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]


def lines(folder):
    return [json.loads(line) for line in (folder / "norms.jsonl").read_text().splitlines()]


def make_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=16, n_embd=32, n_layer=2, n_head=4))


def adapted(model, r=4, targets="all-linear"):
    pytest.importorskip("peft", reason="the extra 'lora' is not installed")
    add_adapters(model, r=r, alpha=6, targets=targets)
    return find_layers(model)


@torch.no_grad()
def shake(parameters, seed=1, size=0.1):
    """As if trained."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        if p.requires_grad:
            p += size * torch.randn(p.shape, generator=generator).to(p.dtype)


def norm_of(tensors):
    return math.hypot(*(t.detach().double().norm().item() for t in tensors))


@pytest.mark.parametrize("make", [make_llama, lambda: make_llama(tied=True), make_gpt2])
@pytest.mark.parametrize("block", [7, 2**21])
def test_norms_and_changes_are_those_of_the_weights(tmp_path, monkeypatch, make, block):
    monkeypatch.setattr(start_weights, "BLOCK", block)
    model = make()
    layers, before = find_layers(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    with NormRecorder(layers, tmp_path) as recorder:
        recorder.begin()
        shake(model.parameters())
        recorder.count(set(layers.parts()))
        recorder.record(1)
    first, last = (line["parts"] for line in lines(tmp_path))
    parts = {part: own for part, own in layers.parts().items() if own}
    assert list(last) == list(parts)
    for part, own in parts.items():
        assert first[part]["norm"] == pytest.approx(norm_of(before[n] for n in own), rel=1e-6)  # float32 sums
        assert first[part]["base_norm"] == pytest.approx(first[part]["norm"], rel=1e-6)
        assert first[part]["num_weights"] == sum(p.numel() for p in own.values())
        assert first[part]["change"] == first[part]["updates"] == 0
        assert "mean_norm" not in first[part]
        assert last[part]["norm"] == pytest.approx(norm_of(own.values()), rel=1e-6)
        assert last[part]["change"] == pytest.approx(norm_of(p - before[n] for n, p in own.items()), rel=1e-6)
        assert last[part]["updates"] == 1


@pytest.mark.parametrize("method", ["full", "lora"])
def test_mean_norm_is_the_papers(tmp_path, method):
    model = make_llama()
    layers = find_layers(model) if method == "full" else adapted(model)
    paper = MeanWeightNorms(layers, trained_only=True)
    with NormRecorder(layers, tmp_path) as recorder:
        recorder.begin()
        for step in range(3):
            shake(model.parameters(), seed=step)
            paper.add()
            recorder.count(set(layers.parts()))
            recorder.record(step + 1)
    last = lines(tmp_path)[-1]["parts"]
    assert last.keys() == paper.mean().keys()
    for part, mean in paper.mean().items():
        assert last[part]["mean_norm"] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # peft, of merging, which nobody does here
def test_untrained_adapters_have_the_papers_norms_and_no_change(tmp_path, tied):
    """A tied head owns no weight, but has an adapter of its own, whose change is to be compared with the weight."""
    layers = adapted(make_llama(hidden_size=64, intermediate_size=128, tied=tied), r=128, targets=PAPER)
    with NormRecorder(layers, tmp_path) as recorder:
        recorder.begin()
    [line] = lines(tmp_path)
    expected = {"embedding": math.sqrt(64 * 128), "head": math.sqrt(128 / 3), "layers.0": math.sqrt(7 * 128 / 3)}
    for part, norm in expected.items():
        assert line["parts"][part]["norm"] == pytest.approx(
            norm, rel=0.02
        )  # 8,192 draws or more: 0.8% is one deviation
        assert line["parts"][part]["change"] == 0
    base = dict(layers.model.named_parameters(remove_duplicate=False))
    head = next(p for name, p in base.items() if name.endswith("lm_head.base_layer.weight"))
    assert line["parts"]["head"]["base_norm"] == pytest.approx(norm_of([head]), rel=1e-6)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # peft sets it right, and says so
@pytest.mark.parametrize("make", [make_llama, make_gpt2])
@pytest.mark.parametrize("begins_at_zero", [True, False])
def test_changes_of_adapters_are_those_of_the_dense_product(tmp_path, make, begins_at_zero):
    model = make()
    layers = adapted(model, targets=PAPER if make is make_llama else "all-linear")
    if not begins_at_zero:
        shake(model.parameters(), seed=5)
    modules = {name: m for name, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    parts = layers.parts()

    def adapters(part, letter):
        return [p for name, p in parts[part].items() if f"lora_{letter}" in name or f"lora_embedding_{letter}" in name]

    def deltas():
        return {name: m.get_delta_weight("default").detach().clone() for name, m in modules.items()}

    start, before = deltas(), {n: p.detach().clone() for n, p in model.named_parameters()}
    with NormRecorder(layers, tmp_path) as recorder:
        recorder.begin()
        shake(model.parameters())
        recorder.count(set(parts))
        recorder.record(1, matrix_ranks=True)
    now, last = deltas(), lines(tmp_path)[-1]["parts"]
    assert set(last) == {part for part in parts if adapters(part, "A")} != set()
    for part, of in last.items():
        inside = [
            name for name, m in modules.items() if any(p is q for p in m.parameters() for q in adapters(part, "A"))
        ]
        changes = {name: (now[name] - start[name]).double() for name in inside}
        assert of["change"] == pytest.approx(norm_of(changes.values()), rel=1e-5)  # peft multiplies in float32
        assert of["a_norm"] == pytest.approx(norm_of(adapters(part, "A")), rel=1e-6)
        assert of["b_norm"] == pytest.approx(norm_of(adapters(part, "B")), rel=1e-6)
        own = {n: p for n, p in parts[part].items() if p.requires_grad}
        assert of["norm"] == pytest.approx(norm_of(own.values()), rel=1e-6)
        assert of["adapter_change"] == pytest.approx(norm_of(p - before[n] for n, p in own.items()), rel=1e-6)
        assert of["matrices"].keys() == changes.keys()
        for name, change in changes.items():
            values = torch.linalg.svdvals(change)
            assert of["matrices"][name]["change"] == pytest.approx(norm_of([change]), rel=1e-5)
            assert of["matrices"][name]["rank"] == pytest.approx(effective_rank(values), rel=1e-3)
            assert of["matrices"][name]["stable_rank"] == pytest.approx(stable_rank(values), rel=1e-4)
            assert of["matrices"][name]["of"] == min(change.shape)
        assert of["rank"] == pytest.approx(sum(m["rank"] for m in of["matrices"].values()) / len(inside))
        assert of["rank"] <= (4.01 if begins_at_zero else 8.01)


@given(sizes=st.tuples(*[st.integers(1, 9)] * 3), seed=st.integers(0, 2**32))
def test_products_are_measured_without_being_made(sizes, seed):
    rows, rank, columns = sizes
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    dense = up.double() @ down.double()
    assert product_norm(up, down) == pytest.approx(dense.norm().item(), rel=1e-6)
    values = product_singular_values(up, down)
    torch.testing.assert_close(values, torch.linalg.svdvals(dense), atol=1e-9, rtol=1e-9)


def test_ranks_of_singular_values_are_as_they_are_defined():
    values = torch.tensor([3.0, 1.0, 0.0])
    assert effective_rank(values) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert stable_rank(values) == pytest.approx((9 + 1) / 9)


def test_ranks_are_those_of_the_change(tmp_path, monkeypatch):
    """Tall, wide and square matrices, in blocks of a few rows or columns; a part of one rank, one of full rank, one at rest."""
    monkeypatch.setattr(start_weights, "BLOCK", 100)
    model = make_llama()
    layers = find_layers(model)
    with NormRecorder(layers, tmp_path) as recorder:
        recorder.begin()
        with torch.no_grad():
            for p in layers.parts()["layers.1"].values():
                if p.ndim == 2:
                    p += torch.outer(torch.randn(p.shape[0]), torch.randn(p.shape[1]))
            model.lm_head.weight[:32] += torch.eye(32)
            shake(layers.parts()["layers.2"].values())
            wide = {name: p.detach().clone() for name, p in layers.parts()["layers.2"].items() if p.ndim == 2}
        recorder.count({"layers.1", "layers.2", "head"})
        recorder.record(1, matrix_ranks=True)
    last = lines(tmp_path)[-1]["parts"]
    assert last["layers.1"]["rank"] == pytest.approx(1, abs=1e-4)  # a Gram matrix has half of the digits
    assert last["layers.1"]["stable_rank"] == pytest.approx(1, abs=1e-6)
    assert len(last["layers.1"]["matrices"]) == 7
    assert last["head"]["rank"] == pytest.approx(32, rel=1e-5)  # of float32 weights: 1 is added to within 6e-8
    assert last["embedding"]["rank"] == last["embedding"]["stable_rank"] == 0
    assert "rank" not in last["norm"]  # it is no matrix
    assert not last["embedding"]["matrices"]
    before = dict(make_llama().named_parameters())
    for name, p in wide.items():
        values = torch.linalg.svdvals((p - before[name]).double())
        assert last["layers.2"]["matrices"][name]["rank"] == pytest.approx(effective_rank(values), rel=1e-5)
        assert last["layers.2"]["matrices"][name]["of"] == min(p.shape)
        assert last["layers.2"]["matrices"][name]["stable_rank"] == pytest.approx(stable_rank(values), rel=1e-5)
    assert {tuple(p.shape) for p in wide.values()} >= {(64, 32), (32, 64), (32, 32)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_step_0_are_read_again_from_the_models_folder(tmp_path, tied, dtype):
    make_llama(tied=tied, vocab_size=len(make_tokenizer())).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    model, _ = load_model(str(tmp_path / "model"), dtype)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1  # not what is in the file: a copy is needed
    layers = find_layers(model)
    with (
        NormRecorder(layers, tmp_path / "a", source=tmp_path / "model") as recorder,
        NormRecorder(layers, tmp_path / "b") as copies,
    ):
        assert recorder.host_bytes == 32 * 64 * dtype.itemsize
        assert copies.host_bytes == sum(p.numel() for p in model.parameters()) * dtype.itemsize
        for each in (recorder, copies):
            each.begin()
        shake(model.parameters())
        for each in (recorder, copies):
            each.count(set(layers.parts()))
            each.record(1, matrix_ranks=True)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert lines(tmp_path / "a")[1]["parts"]["embedding"]["change"] > 0


def test_a_file_without_the_models_prefix_is_read_too(tmp_path):
    model = make_gpt2()
    model.transformer.save_pretrained(tmp_path)  # wte.weight, where the model has transformer.wte.weight
    assert NormRecorder(find_layers(model), tmp_path, source=tmp_path).host_bytes == 0


def test_a_tied_tensor_is_found_under_whichever_name_the_file_has(tmp_path):
    model = make_llama(tied=True)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    assert NormRecorder(find_layers(model), tmp_path, source=tmp_path).host_bytes == 0


def test_a_model_that_changed_on_the_disk_is_told_of(tmp_path):
    model = make_llama()
    model.save_pretrained(tmp_path)
    with NormRecorder(find_layers(model), tmp_path, source=tmp_path) as recorder:
        recorder.begin()
        shake(model.parameters())
        model.save_pretrained(tmp_path)
        recorder.count({"layers.0"})
        with pytest.raises(UserError, match=r"model\.safetensors has changed since the run began"):
            recorder.record(1)


@pytest.mark.parametrize("source", [None, "no/such-model", "not a name at all", "gguf-file.gguf"])
def test_where_there_is_no_folder_weights_are_copied(tmp_path, source):
    model = make_llama()
    recorder = NormRecorder(find_layers(model), tmp_path, source=source)
    assert recorder.host_bytes == 4 * sum(p.numel() for p in model.parameters())
    assert "(0 tensors)" in recorder.describe()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that was made; a view, of a file that is mapped too, holds nothing of its own."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and function._schema.returns[0].alias_info is None:
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_line_holds_a_block_at_a_time(tmp_path, monkeypatch, method):
    """So that peaks stay what they were: no tensor of more than a block is made, of a model with larger ones."""
    monkeypatch.setattr(start_weights, "BLOCK", 128)
    model = make_llama()
    model.save_pretrained(tmp_path)
    layers = find_layers(model) if method == "full" else adapted(model, r=8)
    with NormRecorder(layers, tmp_path, source=tmp_path) as recorder, Largest() as largest:
        recorder.begin()
        recorder.count(set(layers.parts()))
        recorder.record(1)
    assert 64 <= largest.numel <= 128


@pytest.mark.parametrize("method", ["lisa", "lora", "full"])
def test_what_has_not_trained_is_not_read_again(tmp_path, method):
    model = make_llama()
    layers = adapted(model) if method == "lora" else find_layers(model)
    with NormRecorder(layers, tmp_path) as recorder:
        recorder.begin()
        measured = []
        recorder._distances.measure = lambda part: measured.append(part) or {"norm": 1.0, "change": 1.0}
        recorder.count({"layers.2", "outside", "no such part"})
        recorder.record(1)
        recorder.record(2)
    assert measured == [recorder._parts["layers.2"]]


def test_pieces_of_layers_are_parts_too(tmp_path):
    layers = split_layers(find_layers(make_llama()), "halves")
    with NormRecorder(layers, tmp_path) as recorder:
        recorder.begin()
    assert {"layers.0.self_attn", "layers.0.mlp", "layers.0.rest"} <= lines(tmp_path)[0]["parts"].keys()


def test_what_is_not_finite_is_left_out(tmp_path):
    model = make_llama()
    layers = find_layers(model)
    with NormRecorder(layers, tmp_path) as recorder:
        recorder.begin()
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
        recorder.count({"layers.1"})
        recorder.record(1, matrix_ranks=True)
    text = (tmp_path / "norms.jsonl").read_text()
    assert "NaN" not in text
    bad, good = (lines(tmp_path)[1]["parts"][part] for part in ("layers.1", "layers.0"))
    assert not {"norm", "change", "mean_norm"} & bad.keys()
    assert bad["updates"] == 1
    assert {"norm", "change", "mean_norm"} <= good.keys()


def test_adapters_that_are_more_than_a_product_are_refused(tmp_path):
    peft = pytest.importorskip("peft", reason="the extra 'lora' is not installed")
    model = make_llama()
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(UserError, match=r"the adapter of model.layers.0.self_attn.q_proj is not plain LoRA"):
        NormRecorder(find_layers(model), tmp_path)


class Drive:
    """A run as ``lisatune train`` drives it, with a record every second step."""

    def __init__(self, model_folder, data_file, folder, *, records=True, **settings):
        config = {
            "model": str(model_folder), "data": str(data_file), "output": str(folder), "max_steps": 8, "max_length": 64,
            "learning_rate": 1e-2, "per_device_train_batch_size": 4, "eval_rows": 0, "device": "cpu",
        }  # fmt: skip
        if settings["method"] == "lisa":
            settings |= {"num_active": 1, "interval_steps": 3}
        self.config = build_config(config | settings)
        self.run = build(self.config, *preflight(self.config, resume=True), console=Console(file=io.StringIO()))
        folder.mkdir(exist_ok=True)
        write_config(self.config, folder / "config.yaml")
        self.snapshots = Snapshots(
            self.run.learner, Checkpoints(folder), used_settings(self.config), self.run.data.identity
        )
        self.recorder = NormRecorder(self.run.learner.layers, folder, source=self.config.model) if records else None
        self.progress = Progress()

    def begin(self, updates=None):
        if self.recorder:
            self.recorder.begin(self.progress.step, updates)

    def train(self, until):
        learner = self.run.learner
        batches = self.run.data.loader.batches(self.progress.position)
        learner.model.train()
        rate_at = make_schedule(self.config, num_steps=8)
        for step in range(self.progress.step, until):
            batch, self.progress.position = next(batches)
            seed_step(0, step)
            set_learning_rate(learner.optimizer, rate_at(step))
            learner.step(step, [batch], batch.num_labelled)
            self.progress.step = step + 1
            if self.recorder:
                self.recorder.count(learner.trained_parts)
                if (step + 1) % 2 == 0:
                    self.recorder.record(step + 1, matrix_ranks=step + 1 == 8)


METHODS = {
    "lisa": {"method": "lisa"},
    "embedding and head drawn": {"method": "lisa", "train_embedding": "sampled", "train_head": "sampled"},
    "lora": {"method": "lora", "lora_r": 4, "lora_dropout": 0.1},
    "full": {"method": "full"},
    "bfloat16, 8 bits": {"method": "lisa", "dtype": "bfloat16", "optim": "adamw_8bit"},
}


@pytest.mark.parametrize("way", METHODS)
def test_recording_changes_no_bit(model_folder, data_file, memory_path, way):
    """Neither weights nor state, nor what is drawn at random, nor what asks for gradients."""
    pytest.importorskip("peft", reason="the extra 'lora' is not installed")
    ends = []
    for records in (True, False):
        drive = Drive(model_folder, data_file, memory_path / str(records), records=records, **METHODS[way])
        drive.begin()
        seeds = torch.get_rng_state(), random.getstate()
        if records:
            with drive.recorder:
                drive.recorder.record(0, matrix_ranks=True)
                assert torch.equal(seeds[0], torch.get_rng_state())
                assert seeds[1] == random.getstate()
                drive.train(8)
        else:
            drive.train(8)
        parameters = dict(drive.run.learner.model.named_parameters())
        state = drive.run.learner.optimizer.state
        ends.append(
            (
                {n: p.detach() for n, p in parameters.items()},
                {
                    f"{n}:{k}": v
                    for n, p in parameters.items()
                    for k, v in state.get(p, {}).items()
                    if isinstance(v, torch.Tensor)
                },
                {n: (p.requires_grad, p.grad) for n, p in parameters.items()},
                (torch.get_rng_state().tolist(), random.getstate()),
            )
        )
    for a, b in zip(ends[0][:2], ends[1][:2], strict=True):
        assert a.keys() == b.keys()
        assert len(a) > 0
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert ends[0][2:] == ends[1][2:]


@pytest.mark.parametrize("stop", [5, 6])
@pytest.mark.parametrize("way", METHODS)
def test_a_resumed_run_leaves_the_same_lines(model_folder, data_file, memory_path, way, stop):
    """Stopped between two records and at one; a line of a later step, and half a line, are written again."""
    pytest.importorskip("peft", reason="the extra 'lora' is not installed")
    straight = Drive(model_folder, data_file, memory_path / "straight", **METHODS[way])
    straight.begin()
    with straight.recorder:
        straight.train(8)
    stopped = Drive(model_folder, data_file, memory_path / "stopped", **METHODS[way])
    stopped.begin()
    with stopped.recorder:
        stopped.train(stop)
        updates = dict(stopped.recorder.updates)
        stopped.snapshots.save(stopped.progress)
        stopped.train(stop + 2)
    with (memory_path / "stopped" / "norms.jsonl").open("a") as file:
        file.write('{"step": 8, "parts": {"embed')
    resumed = Drive(model_folder, data_file, memory_path / "stopped", **METHODS[way])
    resumed.progress = resumed.snapshots.restore(resumed.snapshots.checkpoints.latest(print))
    assert resumed.progress.step == stop
    resumed.begin(updates if stop % 2 else None)
    with resumed.recorder:
        resumed.train(8)
    text = (memory_path / "straight" / "norms.jsonl").read_text()
    assert (memory_path / "stopped" / "norms.jsonl").read_text() == text
    assert [json.loads(line)["step"] for line in text.splitlines()] == [0, 2, 4, 6, 8]
    last = json.loads(text.splitlines()[-1])["parts"]
    if way == "full":
        assert {of["updates"] for of in last.values()} == {8}
    if way == "lisa":
        assert last["embedding"]["updates"] == 8
        assert sum(last[f"layers.{i}"]["updates"] for i in range(4)) == 8
        assert all((last[f"layers.{i}"]["change"] > 0) == (last[f"layers.{i}"]["updates"] > 0) for i in range(4))


def test_counts_that_nobody_knows_are_not_made_up(tmp_path):
    layers = find_layers(make_llama())
    with NormRecorder(layers, tmp_path) as recorder:
        recorder.begin()
    with pytest.raises(UserError, match="does not say how often each layer had trained at step 3"):
        NormRecorder(layers, tmp_path).begin(3)


def test_a_run_that_begins_anew_writes_anew(tmp_path):
    layers = find_layers(make_llama())
    for _ in range(2):
        with NormRecorder(layers, tmp_path) as recorder:
            recorder.begin()
            recorder.count({"head"})
            recorder.record(1)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1]
    assert lines(tmp_path)[1]["parts"]["head"]["updates"] == 1
