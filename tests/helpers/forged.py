"""Checkpoints to damage and to forge, and what is done with them."""

import tempfile
from pathlib import Path

import torch

import hostile
from lisatune.assemble import make_learner as assembled
from lisatune.data.loader import Batch
from lisatune.run.checkpoint import Checkpoints
from lisatune.run.progress import Progress
from lisatune.run.snapshot import Snapshots
from lisatune.settings import build_config
from tiny import make_llama


def make_learner():
    """A model as small as can be, before its first step."""
    model = make_llama(layers=2, vocab_size=16, hidden_size=8, intermediate_size=8, num_attention_heads=2)
    config = build_config(hostile.NEEDED | {"num_active": 1, "interval_steps": 2, "device": "cpu", "dtype": "float32"})
    return assembled(config, model, torch.device("cpu"))


def take_step(some, step):
    ids = torch.arange(6)[None] + step
    batch = Batch(ids, ids + 1, torch.arange(6)[None], torch.ones_like(ids, dtype=torch.bool))
    some.step(step, [batch], batch.num_labelled)


def real_files():
    """The files of a checkpoint that a learner wrote after three steps."""
    some = make_learner()
    for step in range(3):
        take_step(some, step)
    with tempfile.TemporaryDirectory() as path:
        Snapshots(some, Checkpoints(Path(path)), {"seed": 0}, {"train": "x"}).save(Progress(step=3))
        return {file.name: file.read_bytes() for file in (Path(path) / "checkpoints/checkpoint-3").iterdir()}


def small_files():
    """The files of a checkpoint of two tensors."""
    with tempfile.TemporaryDirectory() as path:
        tensors = {name: {"weight": torch.arange(4.0)} for name in ("weights-head", "state-head")}
        Checkpoints(Path(path)).save(1, tensors, set(), {"standing": {"step": 1}})
        return {file.name: file.read_bytes() for file in (Path(path) / "checkpoints/checkpoint-1").iterdir()}


def try_forged(pick, files, folder):
    """Forge a checkpoint, go on from it, and take a step."""
    hostile.forge(pick, hostile.copy_checkpoint(files, folder / "forged" / "checkpoints", step=3))

    def restore():
        checkpoints, some = Checkpoints(folder / "forged"), make_learner()
        progress = Snapshots(some, checkpoints, {}, {}).restore(checkpoints.latest(lambda text: None))
        take_step(some, progress.step)

    return hostile.try_forged(restore)
