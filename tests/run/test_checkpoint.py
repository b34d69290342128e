"""Checkpoints on the disk."""

import os
import threading

import pytest
import torch

from lisatune import UserError
from lisatune.common.files import replace_folder, write_whole
from lisatune.common.run_folder import checkpoint_steps, only_run
from lisatune.run.checkpoint import Checkpoints, Damaged, read_manifest
from patience import HANG_SECONDS


def tensors(value, *names):
    return {name: {"w": torch.full((4,), float(value))} for name in names}


def names(folder):
    return {p.name for p in folder.iterdir()}


def test_what_is_read_is_what_was_saved(tmp_path):
    Checkpoints(tmp_path).save(3, tensors(1, "weights-norm"), set(), {"loss": 0.1 + 0.2, "nan": float("nan")})
    found = Checkpoints(tmp_path).latest(pytest.fail)
    assert found.folder == tmp_path / "checkpoints" / "checkpoint-3"
    assert found.state["loss"] == 0.1 + 0.2
    assert found.state["nan"] != found.state["nan"]
    assert names(found.folder) == {"weights-norm.safetensors", "state.json", "manifest.json"}
    assert found.manifest == read_manifest(found.folder)


def test_unchanged_files_are_shared_and_each_folder_is_whole_by_itself(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, tensors(1, "a", "b"), set(), {})
    first = (tmp_path / "checkpoints/checkpoint-1/a.safetensors").stat().st_ino
    assert checkpoints.known() == {"a", "b", "state.json"}
    checkpoints.save(2, tensors(2, "b"), {"a"}, {})
    assert names(tmp_path / "checkpoints") == {"checkpoint-2"}
    assert (tmp_path / "checkpoints/checkpoint-2/a.safetensors").stat().st_ino == first
    assert Checkpoints(tmp_path).latest(pytest.fail).manifest.step == 2


def test_where_there_are_no_links_files_are_copied(tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise OSError("no links here")

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tensors(1, "a"), set(), {})
    monkeypatch.setattr(os, "link", refuse)
    checkpoints.save(2, {}, {"a"}, {})
    files = [tmp_path / f"checkpoints/checkpoint-{step}/a.safetensors" for step in (1, 2)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].stat().st_ino != files[1].stat().st_ino
    assert read_manifest(files[1].parent).step == 2


def test_one_that_cannot_be_finished_is_not_there(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tensors(1, "a"), set(), {})
    with pytest.raises(TypeError):
        checkpoints.save(2, tensors(2, "a"), set(), {"not for JSON": object()})
    assert names(tmp_path / "checkpoints") == {"checkpoint-1"}
    assert Checkpoints(tmp_path).latest(pytest.fail).manifest.step == 1


def test_what_a_killed_process_left_is_swept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tensors(1, "a"), set(), {})
    for left in (".writing-2", ".removing-checkpoint-0"):
        (tmp_path / "checkpoints" / left).mkdir()
        (tmp_path / "checkpoints" / left / "a.safetensors").write_bytes(b"half")
    assert checkpoint_steps(tmp_path) == [1]
    checkpoints.save(2, tensors(2, "a"), set(), {})
    assert names(tmp_path / "checkpoints") == {"checkpoint-1", "checkpoint-2"}


def test_later_ones_that_were_passed_over_go_with_the_next(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (2, 4, 6):
        checkpoints.save(step, tensors(step, "a"), set(), {})
    (tmp_path / "checkpoints/checkpoint-6/a.safetensors").unlink()
    told = []
    resumed = Checkpoints(tmp_path)
    assert resumed.latest(told.append).manifest.step == 4
    assert "checkpoint-6/a.safetensors is missing; skipped" in told[0]
    resumed.save(5, tensors(5, "a"), set(), {})
    assert names(tmp_path / "checkpoints") == {"checkpoint-4", "checkpoint-5"}


def test_one_of_the_same_step_that_was_passed_over_is_replaced(tmp_path):
    Checkpoints(tmp_path).save(6, tensors(6, "a"), set(), {})
    (tmp_path / "checkpoints/checkpoint-6/a.safetensors").unlink()
    Checkpoints(tmp_path).save(6, tensors(6, "a"), set(), {})
    assert read_manifest(tmp_path / "checkpoints/checkpoint-6").step == 6


def test_one_of_another_step_is_damaged(tmp_path):
    Checkpoints(tmp_path).save(1, tensors(1, "a"), set(), {})
    (tmp_path / "checkpoints/checkpoint-1").rename(tmp_path / "checkpoints/checkpoint-7")
    with pytest.raises(Damaged, match=r"every checkpoint of .* is damaged \(the oldest: .*checkpoint-7 is of step 1\)"):
        Checkpoints(tmp_path).latest(lambda text: None)


def test_in_the_background_training_goes_on_and_errors_come_to_light(tmp_path, monkeypatch):
    checkpoints, go_on = Checkpoints(tmp_path, background=True), threading.Event()
    save = checkpoints._save
    monkeypatch.setattr(checkpoints, "_save", lambda *args: (go_on.wait(HANG_SECONDS), save(*args)))
    checkpoints.save(1, tensors(1, "a"), set(), {})
    assert checkpoint_steps(tmp_path) == []
    go_on.set()
    checkpoints.wait()
    assert checkpoint_steps(tmp_path) == [1]
    (tmp_path / "checkpoints").rename(tmp_path / "gone")
    (tmp_path / "checkpoints").write_text("a file")
    checkpoints.save(2, tensors(1, "a"), set(), {})
    with pytest.raises(OSError, match="exists"):
        checkpoints.wait()


def test_a_linked_folder_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link, which a run does not follow"):
        Checkpoints(tmp_path / "run")


def test_write_whole_replaces_and_leaves_nothing_beside(tmp_path):
    write_whole(tmp_path / "a", "old")
    write_whole(tmp_path / "a", "new")
    assert names(tmp_path) == {"a"}
    assert (tmp_path / "a").read_text() == "new"


def test_replace_folder_does_not_write_through_a_link(tmp_path):
    for name in ("new", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "new" / "file").write_text("new")
    (tmp_path / "model").symlink_to(tmp_path / "elsewhere")
    replace_folder(tmp_path / "new", tmp_path / "model")
    assert names(tmp_path / "elsewhere") == set()
    assert (tmp_path / "model/file").read_text() == "new"
    assert names(tmp_path) == {"model", "elsewhere"}


def test_a_folder_is_held_once(tmp_path):
    with only_run(tmp_path), pytest.raises(UserError, match="another process trains in"), only_run(tmp_path):
        pass
    with only_run(tmp_path):
        pass
