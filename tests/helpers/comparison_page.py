"""A comparison whose runs never ran, and its page; needs matplotlib."""

import json

from lisatune.compare.grid import make_grid
from lisatune.compare.page import write_comparison
from lisatune.compare.results import Measured, results

EVIL = "$x_1$ <script>alert(1)</script> & \"q\" 'p'"
NEEDED = {"model": "models/<b>tiny<i>", "data": "d", "eval_rows": 6, "max_steps": 8}


def measured(trial):
    """Falls from 3; the more layers and the higher the rate the lower, and a hundredth more with each seed."""
    config = trial.config
    layers = config.num_active if config.method == "lisa" else 8
    end = 2.5 - 0.05 * layers + 0.01 * config.seed - 100 * (config.learning_rate or 5e-5)
    curve = [
        {"step": 4 * i, "tokens": 400.0 * i, "seconds": 0.5 * layers * i, "eval_loss": 3 + (end - 3) * i / 2}
        for i in range(3)
    ]
    numbers = {
        "steps": 8, "tokens": 800, "eval_loss_before": 3.0, "eval_loss_after": end, "train_seconds": 9.0,
        "planned_peak_bytes": layers * 2**28, "peak_bytes": (layers + 1) * 2**28, "base_bytes": 0, "state_bytes": 2**20,
    }  # fmt: skip
    bytes_of = {"weights/decoder": 2**27, "state/decoder": layers * 2**26, "activations": 2**25, "temporaries": 2**24}
    return Measured(numbers, curve, 1000.0, bytes_of)


def page(folder, grid, failed=()):
    """Of the comparison of ``grid`` in which the runs numbered ``failed`` have failed."""
    made = make_grid(NEEDED | grid, folder)
    names = [trial.name for trial in made.trials]
    failures = {names[i]: f"step 3: {EVIL}" for i in failed}
    runs = {trial.name: measured(trial) for trial in made.trials if trial.name not in failures}
    result = {"data": f"60 rows {EVIL}", "made_with": {"python": "3"}} | results(made, runs, failures)
    (folder / "comparison.json").write_text(json.dumps(result))
    (folder / "comparison.yaml").write_text(json.dumps(made.given))
    text = write_comparison(folder).read_text()
    assert (folder / "report.html").read_text() == text
    return text
