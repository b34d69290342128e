"""What can happen to a long run, done for real: nothing is lost, and the end is the same."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from lisatune import UserError
from lisatune.common.run_folder import only_run
from lisatune.run.checkpoint import Checkpoints
from patience import HANG_SECONDS, started, wait_until
from places import HELPERS
from runs import metrics, run, weights


@pytest.fixture
def tmp_path(memory_path):
    return memory_path


SETTINGS = {"num_active": 1, "interval_steps": 3, "save_steps": 1, "max_steps": 120}


def command(model_folder, data_file, output, *words):
    settings = SETTINGS | {"per_device_train_batch_size": 4, "max_length": 64, "learning_rate": 0.01, "eval_rows": 6}
    return [
        sys.executable, "-m", "lisatune", "train", "--model", str(model_folder), "--data", str(data_file),
        "--output", str(output), *(f"{name}={value}" for name, value in settings.items()), *words,
    ]  # fmt: skip


def environment():
    return os.environ | {"COLUMNS": "300", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


def wait_for_steps(folder, count, process):
    """Until ``count`` lines of metrics are there."""
    path = folder / "metrics.jsonl"
    wait_until(lambda: path.exists() and len(path.read_text().splitlines()) > count, process)


@contextmanager
def small_disk(where, size):
    """A file system of ``size`` bytes."""
    where.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", where], capture_output=True)
    if made.returncode:
        pytest.skip("a small file system cannot be mounted here: that takes an administrator")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=True)


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_many_moments(model_folder, data_file, tmp_path, kills):
    """kill -9, writes included; a child that is forked saves the starts of Python and torch."""
    script = HELPERS / "killing.py"
    done = subprocess.run(
        [sys.executable, script, model_folder, data_file, tmp_path, str(kills)],
        capture_output=True, text=True, env=environment(), timeout=HANG_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["kills"] == kills
    assert told["while_writing"] >= 0.4 * kills
    assert told["went_on"] >= kills * 4 // 5, "four of five kills wait for a checkpoint"
    a, b = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "killed")
    best = [json.loads((tmp_path / n / "summary.json").read_text())["best_step"] for n in ("straight", "killed")]
    assert best[0] == best[1] < 150, "keep_best finds the same, and has put it back"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(model_folder, data_file, tmp_path, number):
    words = command(model_folder, data_file, tmp_path / "run", "save_steps=1000000")
    held = [words[0], HELPERS / "held.py", 5, *words[3:]]
    with started(held, stderr=subprocess.PIPE, env=environment()) as process:
        wait_for_steps(tmp_path / "run", 5, process)
        process.send_signal(number)
        said = process.communicate()[1]
    assert process.returncode == 128 + number
    assert "Traceback" not in said
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = saved.name.removeprefix("checkpoint-")
    assert f"lisatune: stopped after step {step} of 120; resume with: lisatune train --resume --config" in said
    if number == signal.SIGINT:
        return
    told = said.partition("resume with: lisatune train ")[2].split()
    done = subprocess.run([*words[:4], *told], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    straight = subprocess.run(
        command(model_folder, data_file, tmp_path / "straight"), capture_output=True, env=environment()
    )
    assert straight.returncode == 0
    a, b = weights(tmp_path / "straight"), weights(tmp_path / "run")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_second_signal_ends_at_once_and_leaves_a_whole_checkpoint(model_folder, data_file, tmp_path):
    words = command(model_folder, data_file, tmp_path / "run", "max_steps=100000")
    with started(words, stderr=subprocess.PIPE, env=environment()) as process:
        wait_for_steps(tmp_path / "run", 5, process)
        process.send_signal(signal.SIGSTOP)  # so that both are there before it can end its step
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        assert "stopped after step" not in process.communicate()[1]
    assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    passed_over = []
    assert Checkpoints(tmp_path / "run").latest(passed_over.append) is not None
    assert not passed_over


def test_full_disk(model_folder, data_file, tmp_path):
    """The checkpoint that does not fit is not there, the one before is, and with room the run goes on to the same end."""
    run(model_folder, data_file, tmp_path / "straight", **SETTINGS)
    with small_disk(tmp_path / "disk", "1200k") as disk:
        filler = disk / "filler"
        filler.write_bytes(bytes(700_000))
        with pytest.raises(
            UserError, match=r"cannot be written \(No space left on device\), so the run was stopped; resume"
        ):
            run(model_folder, data_file, disk / "run", **SETTINGS)
        left = sorted(p.name for p in (disk / "run" / "checkpoints").iterdir())
        assert left
        assert all(name.startswith("checkpoint-") for name in left)
        filler.unlink()
        _, said = run(model_folder, data_file, disk / "run", resume=True, **SETTINGS)
        assert "going on after step" in said
        assert "; skipped" not in said
        a, b = weights(tmp_path / "straight"), weights(disk / "run")
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert metrics(tmp_path / "straight") == metrics(disk / "run")


def give_up_the_rights_of_root():
    """Of a child that is root, for whom a folder is never read-only."""
    drop_from_bounding_set, override_permissions = 24, 1
    ctypes.CDLL(None).prctl(drop_from_bounding_set, override_permissions, 0, 0, 0)


def test_a_folder_that_becomes_read_only(model_folder, data_file, tmp_path):
    words = command(model_folder, data_file, tmp_path / "run", "max_steps=100000")
    options = {"stderr": subprocess.PIPE, "env": environment(), "preexec_fn": give_up_the_rights_of_root}
    folder = tmp_path / "run" / "checkpoints"
    with started(words, **options) as process:
        wait_for_steps(tmp_path / "run", 5, process)
        folder.chmod(0o555)
        said = process.communicate(timeout=HANG_SECONDS)[1]
    folder.chmod(0o755)
    assert process.returncode == 2, said
    assert "Traceback" not in said
    assert "cannot be written (Permission denied), so the run was stopped; resume with" in said
    assert Checkpoints(tmp_path / "run").latest(pytest.fail) is not None


def test_out_of_memory_names_the_levers(model_folder, data_file, tmp_path):
    """The limit is on the address space, set once the run is under way."""
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": "abcdefgh " * 3000}) + "\n")
    script = (
        "import resource, sys\n"
        "from lisatune.cli import main\n"
        "from lisatune.run.build import Run\n"
        f"sys.path.append({str(HELPERS)!r})\n"
        "from steps import before_each_step\n"
        "def limit(step):\n"
        "    used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, resource.RLIM_INFINITY))\n"
        "Run.batches = before_each_step(limit)\n"
        "main()\n"
    )
    words = [
        sys.executable, "-c", script, "train", "--model", str(model_folder), "--data", str(long), "--output",
        str(tmp_path / "run"), "max_steps=2", "max_length=20000", "num_active=1",
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, env=environment())
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert "out of memory on cpu" in done.stderr
    assert "add levers until it fits, each with those before it: " in done.stderr
    assert "gradient_checkpointing=true (" in done.stderr


def poisoned(model_folder, tmp_path, token):
    """A model that gives NaN for whatever holds ``token``."""
    folder = tmp_path / "poisoned"
    shutil.copytree(model_folder, folder)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def with_one_bad_row(model_folder, data_file, tmp_path, tokenizer):
    rows = data_file.read_text().splitlines()
    rows[20] = json.dumps({"prompt": "What is Z?", "completion": "It is ~."})
    data_file.write_text("\n".join(rows) + "\n")
    return poisoned(model_folder, tmp_path, tokenizer("~", add_special_tokens=False)["input_ids"][-1])


def test_a_bad_batch_is_named_and_stops_the_run(with_one_bad_row, data_file, tmp_path):
    some = {"per_device_train_batch_size": 2, "max_steps": 40, "save_steps": 1, "eval_rows": None}
    with pytest.raises(
        UserError, match=r"the loss is nan and the gradient norm nan with the rows .*line 21.*lower learning_rate"
    ):
        run(with_one_bad_row, data_file, tmp_path / "run", **some)
    bad = metrics(tmp_path / "run")[-1]["step"]
    steps = {int(p.name.removeprefix("checkpoint-")) for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert max(steps) == bad
    summary, said = run(
        with_one_bad_row, data_file, tmp_path / "run", resume=True, allow_changes=True, on_bad_step="skip", **some
    )
    assert summary["skipped_steps"] >= 1
    assert ": left out" in said
    held = weights(tmp_path / "run")
    assert sum(w.isnan().any().item() for w in held.values()) == 1  # the embedding's row that was NaN before


def test_a_skipped_batch_changes_nothing(with_one_bad_row, data_file, tmp_path):
    """No weight, no moment, no counter of the optimizer: only the data and the learning rate go on."""
    some = {
        "per_device_train_batch_size": 2,
        "max_steps": 29,
        "save_steps": 1,
        "eval_rows": None,
        "save_total_limit": 99,
    }
    run(with_one_bad_row, data_file, tmp_path / "run", on_bad_step="skip", **some)
    (bad,) = [row["step"] for row in metrics(tmp_path / "run") if row.get("skipped")]
    folder = tmp_path / "run" / "checkpoints"
    for name in ("weights-embedding", "state-embedding", "weights-norm", "state-norm"):
        before, after = (load_file(folder / f"checkpoint-{s}" / f"{name}.safetensors") for s in (bad - 1, bad))
        assert all(torch.equal(before[k].nan_to_num(7), after[k].nan_to_num(7)) for k in before)


def test_a_gradient_that_explodes(model_folder, data_file, tmp_path):
    norms = [row["grad_norm"] for row in (run(model_folder, data_file, tmp_path / "a"), metrics(tmp_path / "a"))[1][1:]]
    limit = sorted(norms)[-2]
    with pytest.raises(UserError, match=rf"step {norms.index(max(norms)) + 1}: .*bad_grad_norm"):
        run(model_folder, data_file, tmp_path / "b", bad_grad_norm=limit)


def test_skipping_for_ever_is_no_training(model_folder, data_file, tmp_path):
    with pytest.raises(UserError, match="for the 10th time in a row, so the run was stopped"):
        run(model_folder, data_file, tmp_path / "run", bad_grad_norm=1e-9, on_bad_step="skip")


def test_two_runs_in_one_folder_exclude_each_other(model_folder, data_file, tmp_path):
    """A process that is killed lets go of the folder."""
    words = command(model_folder, data_file, tmp_path / "run", "max_steps=100000")
    with started(words, stderr=subprocess.DEVNULL, env=environment()) as process:
        wait_for_steps(tmp_path / "run", 2, process)
        with pytest.raises(UserError, match="another process trains in"):
            run(model_folder, data_file, tmp_path / "run", resume=True, **SETTINGS)
    with only_run(tmp_path / "run"):
        pass
