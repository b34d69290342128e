"""What a checkpoint costs: of what changed since the one before, against everything, the usual way.

python benchmarks/checkpoints.py [--steps 24] [--every 4] [--interval-steps 8]

A random model in the shape of SmolLM2-135M. Bytes are those that went to the disk (files with one name only, the day they are
written); seconds are those in which the run waits, hashing and flushing to the disk included. The usual way is that of
``transformers.Trainer``: all weights and all the state that the optimizer holds, here with the same care (hash and flush).
Both are saved after the same steps by turns, so that a busy disk troubles both.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from results import SHAPES, markdown, write_page
from transformers import AutoModelForCausalLM

from lisatune.assemble import make_learner
from lisatune.data.loader import Batch
from lisatune.learner import Learner
from lisatune.plan.forecast import model_config
from lisatune.run.checkpoint import Checkpoints
from lisatune.run.progress import Progress
from lisatune.run.snapshot import Snapshots
from lisatune.settings import build_config

MIB = 2**20
SHAPE = SHAPES / "smollm2-135m.json"


def batch_of(step: int) -> Batch:
    """Two rows of 32 tokens: what is measured is not the step."""
    ids = torch.randint(3, 1000, (2, 32), generator=torch.Generator().manual_seed(step))
    return Batch(ids, ids.roll(-1, 1), torch.arange(32).repeat(2, 1), torch.ones_like(ids, dtype=torch.bool))


def written(folder: Path, step: int) -> int:
    """Bytes of a checkpoint that no other one shares."""
    files = (folder / "checkpoints" / f"checkpoint-{step}").iterdir()
    return sum(file.stat().st_size for file in files if file.stat().st_nlink == 1)


class Everything:
    """Saves all parts each time."""

    def __init__(self, learner: Learner, folder: Path) -> None:
        self.learner = learner
        self.snapshots = Snapshots(learner, Checkpoints(folder), {}, {})
        self.all = {part for part, own in learner.layers.parts().items() if own}

    def save(self, progress: Progress) -> None:
        trained_at, self.learner.trained_at = self.learner.trained_at, dict.fromkeys(self.all, progress.step)
        self.snapshots.save(progress)
        self.learner.trained_at = trained_at


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--interval-steps", type=int, default=8)
    options = parser.parse_args()
    head = [
        "method", "state", "first, MiB", "later, MiB", "everything, MiB", "later / everything", "later, s", "everything, s",
        "ratio",
    ]  # fmt: skip
    rows = []
    for name, settings in {
        "LISA, gamma 2": {},
        "LISA, embedding and head frozen": {"train_embedding": False, "train_head": False},
        "LISA, moments kept": {"state_policy": "keep"},
        "LISA, moments in 8 bits": {"optim": "adamw_8bit"},
        "full": {"method": "full"},
        "LoRA r16": {"method": "lora"},
    }.items():
        lisa = settings.get("method", "lisa") == "lisa"
        more = {"num_active": 2, "interval_steps": options.interval_steps} if lisa else {}
        needed = {"model": "-", "data": "-", "output": "-", "dtype": "float32"}
        learner = make_learner(
            build_config(needed | more | settings),
            AutoModelForCausalLM.from_config(model_config(str(SHAPE)), dtype=torch.float32),
            torch.device("cpu"),
        )
        folder = Path(tempfile.mkdtemp())
        ours = Snapshots(learner, Checkpoints(folder / "ours"), {}, {})
        (folder / "ours").mkdir()
        (folder / "all").mkdir()
        usual = Everything(learner, folder / "all")
        bytes_ours, bytes_all, seconds_ours, seconds_all = [], [], [], []
        for step in range(options.steps):
            batch = batch_of(step)
            learner.step(step, [batch], batch.num_labelled)
            if (step + 1) % options.every:
                continue
            progress = Progress(step=step + 1)
            for saver, where, seconds, sizes in [
                (usual, "all", seconds_all, bytes_all), (ours, "ours", seconds_ours, bytes_ours)
            ]:  # fmt: skip
                tick = time.perf_counter()
                saver.save(progress)
                seconds.append(time.perf_counter() - tick)
                sizes.append(written(folder / where, step + 1))
        shutil.rmtree(folder)
        later, everything = statistics.median(bytes_ours[1:]), statistics.median(bytes_all[1:])
        took, all_took = statistics.median(seconds_ours[1:]), statistics.median(seconds_all[1:])
        mib = [f"{size / MIB:,.0f}" for size in (bytes_ours[0], later, everything)]
        seconds = [f"{value:.2f}" for value in (took, all_took, took / all_took)]
        rows.append([name, settings.get("optim", "adamw"), *mib, f"{later / everything:.2f}", *seconds])
        print(*rows[-1], sep=" | ", flush=True)
    table = (
        markdown(head, rows)
        + f"\n\nA checkpoint every {options.every} steps, layers drawn every {options.interval_steps}."
    )
    print(write_page("checkpoints", table, __doc__).read_text())


if __name__ == "__main__":
    main()
