"""A run that was stopped and resumed is the run that was never stopped, to the bit."""

import pytest
import torch
from safetensors.torch import load_file

from lisatune import UserError
from lisatune.assemble import make_learner
from lisatune.data.loader import Batch
from lisatune.run.checkpoint import Checkpoints
from lisatune.run.progress import Progress
from lisatune.run.snapshot import Snapshots
from lisatune.settings import build_config
from runs import manifest, metrics, run, weights
from tiny import VOCABULARY, make_llama
from ways import WAYS


@pytest.fixture
def tmp_path(memory_path):
    return memory_path


@pytest.mark.parametrize("way", [way for way in WAYS if way.resumes and not way.is_for_gpu], ids=str)
def test_a_run_learns_and_a_resumed_one_is_the_run_that_was_never_stopped(model_folder, data_file, tmp_path, way):
    """Stopped twice: in the middle of an interval and at its end; weights, moments and metrics are equal to the bit."""
    way.skip_if_missing()
    some = {"save_steps": 13, **way.settings}
    straight, _ = run(model_folder, data_file, tmp_path / "straight", **some)
    if straight["eval_loss_before"] is not None:
        assert straight["eval_loss_after"] < straight["eval_loss_before"] - way.falls
    run(model_folder, data_file, tmp_path / "stopped", stop_after=6, **some)
    torch.manual_seed(99)  # nothing may depend on what a process had drawn before
    run(model_folder, data_file, tmp_path / "stopped", stop_after=8, resume=True, **some)
    summary, said = run(model_folder, data_file, tmp_path / "stopped", resume=True, **some)
    assert "going on after step 8 of" in said
    a, b = weights(tmp_path / "straight"), weights(tmp_path / "stopped")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert manifest(tmp_path / "straight", 13) == manifest(tmp_path / "stopped", 13)
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "stopped")
    same = ("steps", "tokens", "eval_loss_before", "eval_loss_after", "state_bytes", "skipped_steps")
    assert {k: straight[k] for k in same} == {k: summary[k] for k in same}


def test_over_several_epochs(model_folder, data_file, tmp_path):
    some = {
        "max_steps": None,
        "num_train_epochs": 3,
        "packing": True,
        "max_length": 100,
        "per_device_train_batch_size": 4,
    }
    straight, _ = run(model_folder, data_file, tmp_path / "straight", **some)
    assert straight["steps"] > 12
    for number, stop_after in enumerate(range(2, straight["steps"], 5)):
        run(model_folder, data_file, tmp_path / "stopped", stop_after, resume=number > 0, **some)
    run(model_folder, data_file, tmp_path / "stopped", resume=True, **some)
    a, b = weights(tmp_path / "straight"), weights(tmp_path / "stopped")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "stopped")


@pytest.mark.parametrize("way", [way for way in WAYS if way.resumes and way.is_for_gpu], ids=str)
def test_what_is_off_the_device_comes_back(tmp_path, way):
    """The levers that a run on a CPU refuses, since they help only a GPU, work on one all the same."""
    way.skip_if_missing()
    levers = way.settings
    needed = {"model": "-", "data": "-", "output": "-", "dtype": "float32", "learning_rate": 1e-2}
    needed |= {"num_active": 1, "interval_steps": 3} if "method" not in levers else {}
    config = build_config(needed | levers)

    def made():
        model = make_llama(torch_dtype=getattr(torch, config.dtype)).to(getattr(torch, config.dtype))
        torch.manual_seed(0)
        learner = make_learner(config, model, torch.device("cpu"))
        learner.model.train()
        return learner

    def take(learner, steps):
        for step in steps:
            ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(step))
            positions = torch.arange(12).repeat(2, 1)
            batch = Batch(ids, ids.roll(-1, 1), positions, torch.ones_like(ids, dtype=torch.bool))
            learner.step(step, [batch], batch.num_labelled)

    straight, before, after = made(), made(), made()
    take(straight, range(10))
    take(before, range(5))
    Snapshots(before, Checkpoints(tmp_path), {}, {}).save(Progress(step=5))
    checkpoints = Checkpoints(tmp_path)
    progress = Snapshots(after, checkpoints, {}, {}).restore(checkpoints.latest(print))
    assert progress.step == 5
    take(after, range(5, 10))
    pairs = zip(straight.model.named_parameters(), after.model.named_parameters(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)
    assert len(straight.optimizer.state) == len(after.optimizer.state)
    for one, other in zip(straight.model.parameters(), after.model.parameters(), strict=True):
        a, b = straight.optimizer.state.get(one, {}), after.optimizer.state.get(other, {})
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_checkpoint_costs_what_changed(model_folder, data_file, tmp_path):
    """Of the layers that did not train since the checkpoint before there is no second copy, of those never drawn none."""
    run(model_folder, data_file, tmp_path / "run", num_active=1, interval_steps=4, save_steps=2, save_total_limit=99)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(int(p.name.removeprefix("checkpoint-")) for p in folder.iterdir()) == [2, 4, 6, 8, 10, 12]
    drawn = {row["step"]: row["active_layers"][0] for row in metrics(tmp_path / "run")[1:]}
    for step in (2, 4, 6, 8, 10, 12):
        names = {name.removesuffix(".safetensors") for name in manifest(tmp_path / "run", step)}
        ever = {f"weights-layers.{drawn[s]}" for s in range(1, step + 1)}
        assert {name for name in names if name.startswith("weights-layers")} == ever
        assert {name for name in names if name.startswith("state-layers")} == {f"state-layers.{drawn[step]}"}
    assert drawn[4] != drawn[8]
    first = f"checkpoint-{{}}/weights-layers.{drawn[4]}.safetensors".format
    assert (folder / first(4)).stat().st_ino == (folder / first(8)).stat().st_ino
    assert (folder / first(2)).stat().st_ino != (folder / first(4)).stat().st_ino


def test_a_changed_setting_is_refused_unless_asked_for(model_folder, data_file, tmp_path):
    run(model_folder, data_file, tmp_path / "run", 3)
    with pytest.raises(UserError, match=r"began differently: learning_rate=0\.02 \(was 0\.01\); seed=1 \(was 0\)"):
        run(model_folder, data_file, tmp_path / "run", resume=True, learning_rate=2e-2, seed=1)
    _, said = run(model_folder, data_file, tmp_path / "run", resume=True, learning_rate=2e-2, allow_changes=True)
    assert "changed since the run began: learning_rate=0.02 (was 0.01)" in said
    assert "going on after step 3" in said


@pytest.mark.parametrize("streaming", [False, True])
def test_changed_data_are_refused(model_folder, data_file, tmp_path, streaming):
    some = {"streaming": True, "eval_rows": None} if streaming else {}
    run(model_folder, data_file, tmp_path / "run", 3, **some)
    text = data_file.read_text()
    data_file.write_text(text.replace("It is 8.", "It is 9."))
    with pytest.raises(UserError, match=r"began differently: train data: .* \(was "):
        run(model_folder, data_file, tmp_path / "run", resume=True, **some)
    data_file.write_text(text)
    run(model_folder, data_file, tmp_path / "run", resume=True, **some)


def test_another_base_model_is_refused(model_folder, data_file, tmp_path):
    """A layer that was not drawn yet is taken from the base model, so that has to be the same."""
    from safetensors.torch import save_file

    copy = tmp_path / "model"
    copy.mkdir()
    for file in model_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    run(copy, data_file, tmp_path / "run", 2, num_active=1)
    active = metrics(tmp_path / "run")[1]["active_layers"][0]
    other = next(i for i in range(4) if i != active)
    held = load_file(copy / "model.safetensors")
    held[f"model.layers.{other}.mlp.up_proj.weight"][0, 0] += 1
    save_file(held, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"the base model is not the one .*layers.{other} has other weights"):
        run(copy, data_file, tmp_path / "run", resume=True, num_active=1)


def test_the_same_command_without_resume_says_how_to_go_on(model_folder, data_file, tmp_path):
    run(model_folder, data_file, tmp_path / "run", 3)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"a run that was stopped after step 3 or later: add --resume to resume it"):
        run(model_folder, data_file, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    run(model_folder, data_file, tmp_path / "run", resume=True)
    with pytest.raises(UserError, match="already holds a finished run"):
        run(model_folder, data_file, tmp_path / "run")
    _, said = run(model_folder, data_file, tmp_path / "run", resume=True)
    assert "nothing is left to do" in said


def test_resume_of_nothing_begins(model_folder, data_file, tmp_path):
    """So that one command serves a job that may be restarted."""
    run(model_folder, data_file, tmp_path / "new", resume=True)
    run(model_folder, data_file, tmp_path / "plain")
    assert metrics(tmp_path / "new") == metrics(tmp_path / "plain")


def test_a_finished_run_can_be_made_longer(model_folder, data_file, tmp_path):
    some = {"save_steps": 3, "lr_scheduler_type": "constant"}
    run(model_folder, data_file, tmp_path / "long", **some)
    run(model_folder, data_file, tmp_path / "short", max_steps=10, **some)
    run(model_folder, data_file, tmp_path / "short", resume=True, allow_changes=True, **some)
    a, b = weights(tmp_path / "long"), weights(tmp_path / "short")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("damage", ["cut off", "flipped", "missing", "no manifest", "manifest flipped"])
def test_a_damaged_checkpoint_is_passed_over(model_folder, data_file, tmp_path, damage):
    run(model_folder, data_file, tmp_path / "straight", save_steps=4)
    run(model_folder, data_file, tmp_path / "run", 10, save_steps=4)
    newest = tmp_path / "run" / "checkpoints" / "checkpoint-10"
    file = newest / ("manifest.json" if "manifest" in damage else "state-norm.safetensors")
    held = bytearray(file.read_bytes())
    if damage == "cut off":
        file.write_bytes(held[:-1])
    elif damage.endswith("flipped"):
        held[len(held) // 2] ^= 4
        file.write_bytes(held)
    else:
        file.unlink()
    _, said = run(model_folder, data_file, tmp_path / "run", resume=True, save_steps=4)
    assert f"{newest}" in said
    assert "skipped" in said
    assert "going on after step 8" in said
    a, b = weights(tmp_path / "straight"), weights(tmp_path / "run")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "run")


def test_no_whole_checkpoint_is_no_silent_new_beginning(model_folder, data_file, tmp_path):
    run(model_folder, data_file, tmp_path / "run", 10, save_steps=4)
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    with pytest.raises(UserError, match=r"every checkpoint of .* is damaged .*train again with another output"):
        run(model_folder, data_file, tmp_path / "run", resume=True, save_steps=4)


def test_checkpoints_in_minutes_and_their_number(model_folder, data_file, tmp_path):
    run(model_folder, data_file, tmp_path / "run", save_minutes=1e-9, save_total_limit=3)
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {f"checkpoint-{s}" for s in (11, 12, 13)}


def test_other_processes_and_versions_are_told_of(model_folder, data_file, tmp_path, monkeypatch):
    run(model_folder, data_file, tmp_path / "run", 3)
    monkeypatch.setattr("lisatune.run.snapshot.version", lambda package: "0.1")
    monkeypatch.setattr("lisatune.run.snapshot.environment", lambda device: {"torch": "0.1"})
    monkeypatch.setattr("lisatune.run.resume.environment", lambda device: {"torch": "0.1"})
    _, said = run(model_folder, data_file, tmp_path / "run", resume=True)
    assert f"torch was {torch.__version__}, now it is 0.1: bit-identical weights need the same" in said
