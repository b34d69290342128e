import io
import sys

from rich.console import Console

from lisatune.run.finish import report_if_possible


def test_without_matplotlib_a_run_says_what_the_report_needs(tmp_path, monkeypatch):
    """The extra's name stands in brackets, which the terminal could take for a style."""
    monkeypatch.setitem(sys.modules, "lisatune.run.report", None)
    console = Console(file=io.StringIO(), width=500)
    report_if_possible(tmp_path, console)
    assert console.file.getvalue() == (
        "no report.html, which needs matplotlib: pip install 'lisatune[report]', then lisatune report RUN\n"
    )
    assert list(tmp_path.iterdir()) == []
