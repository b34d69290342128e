"""Runs where MKL multiplies as it likes, each promise against its plain run: python default_mode.py MODEL DATA FOLDER.

The first process prints as JSON how far the runs with a lever ended from the plain one, and leaves a run unfinished; a second
one, called alike, resumes it.
"""

import json
import sys
from pathlib import Path

NUM_STEPS, LEARNING_RATE, ROWS, MAX_LENGTH = 6, 0.005, 4, 64
SETTINGS = {"adam_epsilon": 1.0, "max_steps": NUM_STEPS, "save_steps": 1, "learning_rate": LEARNING_RATE, "eval_rows": 6,
            "num_active": 2, "interval_steps": 4}  # fmt: skip
MOVED = ("checkpointing", "inputs off the device", "frozen layers off the device", "moments off the device")


def distance(ours, theirs, before):
    """How far apart two models are, as a part of how far the second has moved."""
    apart = sum((ours[n].double() - theirs[n].double()).square().sum() for n in theirs)
    moved = sum((theirs[n].double() - before[n].double()).square().sum() for n in theirs)
    return float((apart / moved) ** 0.5)


def levers():
    """Distance of a run with each lever to one without, over three draws."""
    sys.path.append(str(Path(__file__).parents[1]))
    from lever_steps import run
    from tiny import make_llama
    from ways import named

    settings = {"optim": "adamw_16bit", "adam_epsilon": 1.0, "learning_rate": LEARNING_RATE, "steps": NUM_STEPS}
    before = {name: p.detach() for name, p in make_llama().named_parameters()}
    plain = run(**settings)[0]
    return {name: distance(run(**settings, **named(name).settings)[0], plain, before) for name in MOVED}


def main(model, data, folder):
    import torch

    from lisatune.run.determinism import mkl_mode
    from runs import run

    torch.set_num_threads(1)
    settings = SETTINGS | {"per_device_train_batch_size": ROWS, "max_length": MAX_LENGTH}
    if (folder / "stopped").exists():
        run(model, data, folder / "stopped", resume=True, **settings)
        return
    told = {"mode": mkl_mode(), "levers": levers()}
    run(model, data, folder / "straight", **settings)
    run(model, data, folder / "stopped", stop_after=3, **settings)
    print(json.dumps(told))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
