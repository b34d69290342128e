import io
import sys

import pytest
from rich.console import Console

from lisatune.run.finish import report_if_possible
from peaks import WIDE
from runs import run
from tiny import make_llama


@pytest.mark.parametrize("settings", [{}, {"method": "full", "packing": True, "gradient_accumulation_steps": 2}])
def test_on_a_cpu_the_forecast_stands_beside_the_tensors_that_were_held(data_file, tmp_path, tokenizer, settings):
    """Every token is learned here, as the forecast takes it; a row is a little shorter than the longest that there may be."""
    make_llama(**WIDE | {"vocab_size": 4000}).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    more = {"max_length": 50, "completion_only_loss": False, "max_steps": 4}
    summary, _ = run(tmp_path / "model", data_file, tmp_path / "run", **settings, **more)
    assert summary["tensor_peak_bytes"] == pytest.approx(summary["planned_peak_bytes"], rel=0.05)
    assert summary["peak_bytes"] > summary["base_bytes"] > 0


def test_without_matplotlib_a_run_says_what_the_report_needs(tmp_path, monkeypatch):
    """The extra's name stands in brackets, which the terminal could take for a style."""
    monkeypatch.setitem(sys.modules, "lisatune.run.report", None)
    console = Console(file=io.StringIO(), width=500)
    report_if_possible(tmp_path, console)
    assert console.file.getvalue() == (
        "no report.html, which needs matplotlib: pip install 'lisatune[report]', then lisatune report RUN\n"
    )
    assert list(tmp_path.iterdir()) == []
