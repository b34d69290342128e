"""Whole runs, stopped where a test says, and what their folders hold."""

import io
import json
import signal

import pytest
from rich.console import Console
from safetensors.torch import load_file

import lisatune.run.build
from lisatune.errors import Stopped
from lisatune.plan.forecast import plan_run
from lisatune.processes.collectives import num_ranks
from lisatune.run.build import build
from lisatune.run.preflight import preflight
from lisatune.settings import build_config
from lisatune.train import train, train_built
from steps import before_each_step

STEPS = 14
PLANS = {}


def plan_once(config, hf_config, device="cuda", **shape):
    """``plan_run``, whose answer depends on its arguments alone: runs with equal ones share it, as it is half of a short run."""
    settings = config.model_dump_json(exclude={"model", "data", "output"})
    key = (settings, hf_config.to_json_string(), device, *sorted(shape.items()), num_ranks())
    if key not in PLANS:
        PLANS[key] = plan_run(config, hf_config, device, **shape)
    return PLANS[key]


lisatune.run.build.plan_run = plan_once


def run(model_folder, data_file, output, stop_after=None, resume=False, allow_changes=False, **settings):
    """Train; with ``stop_after`` a real SIGTERM comes as that step begins."""
    defaults = {
        "model": str(model_folder),
        "data": str(data_file),
        "output": str(output),
        "max_steps": STEPS,  # more than an epoch of most of the ways
        "learning_rate": 1e-2,
        "max_length": 64,
        "per_device_train_batch_size": 5,
        "eval_rows": 6,
    }
    if settings.get("method", "lisa") == "lisa":
        defaults |= {"num_active": 2, "interval_steps": 4}
    config = build_config({k: v for k, v in (defaults | settings).items() if v is not None})
    console = Console(file=io.StringIO(), width=500)
    if stop_after is not None:

        def interrupt(step):
            if step + 1 == stop_after:
                signal.raise_signal(signal.SIGTERM)

        begun = build(config, *preflight(config, resume=resume), console=console)
        begun.batches = before_each_step(interrupt, begun.batches)
        with pytest.raises(Stopped, match=f"stopped after step {stop_after} of") as stopped:
            train_built(begun, console=console, resume=resume)
        assert stopped.value.signal == signal.SIGTERM
        return None, console.file.getvalue()
    return train(config, console=console, resume=resume, allow_changes=allow_changes), console.file.getvalue()


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("step_seconds", "peak_bytes", "process")} for row in rows]


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def manifest(folder, step):
    """SHA-256 of every file of weights and optimizer state."""
    read = json.loads((folder / "checkpoints" / f"checkpoint-{step}" / "manifest.json").read_text())
    return {name: record for name, record in read["files"].items() if name != "state.json"}
