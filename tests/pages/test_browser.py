"""The pages as people see them: in a real browser, on a phone and on a desk, light and dark."""

import json

import pytest

from browser import BROWSER, browser, look
from lisatune.data.files import DataFile
from lisatune.data.inspection import Inspection, PaddingShares, ShownRow
from lisatune.data.tokenize import Counts
from lisatune.data.view import write_page
from lisatune.run.report import write_report

if BROWSER is None:
    pytest.skip("no Chromium on this machine", allow_module_level=True)


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A run's folder as ``train`` leaves it, drawn."""
    pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(
        "method: lisa\nmodel: models/a-model-with-a-long-name-that-could-widen-the-page-135M\nseed: 0\n"
    )
    rows = [{"step": 0, "eval_loss": 4.0}] + [
        {"step": s, "loss": 4.0 / s, "active_layers": [s // 5 % 4], "tokens": 100, "step_seconds": 0.1}
        for s in range(1, 60)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        "method": "lisa", "steps": 59, "tokens": 5900, "eval_loss_before": 4.0, "eval_loss_after": 0.1, "train_seconds": 6.0,
        "planned_peak_bytes": 2**30, "peak_bytes": 2**31, "base_bytes": 2**29, "state_bytes": 2**28,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    answers = [{"question": "What is this?", "before": "word " * 40, "after": "An" + "other" * 30, "expected": "x"}]
    (folder / "answers.json").write_text(json.dumps(answers))
    return write_report(folder)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """A comparison's page, with curves, bars, a heat map and names that are too long."""
    pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
    from comparison_page import page

    folder = tmp_path_factory.mktemp("comparison")
    grid = {"num_active": [1, 2, 4], "interval_steps": [1, 5], "learning_rate": [1e-4, 1e-3], "seed": [0, 1]}
    page(folder, grid, failed=[0])
    return folder / "report.html"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The page of `lisatune data`, with a long word and rows beyond max_length."""
    folder = tmp_path_factory.mktemp("rows")
    counts = Counts(read=90, used=40, refused=50, tokens=9000, labelled_tokens=4000, truncated=9, cut_tokens=99)
    counts.left_out["a_column_that_nobody_knows"] = 40
    counts.reasons["the answer is empty"] = 50
    text = [("<|im_start|>user\nWhat?<|im_end|>\n", False), ("x" * 300 + "<|im_end|>", True)]
    found = Inspection(
        ["rows.jsonl"], ["rows.jsonl: 1 file"], [DataFile(folder / "rows.jsonl", num_rows=90)], [], counts, list(range(10, 90)), 60, 8,
        PaddingShares(0.3, 0.1, 0.05), [ShownRow("rows.jsonl, line 1", text, list(range(99)), [-100] * 40 + list(range(59)))],
        ["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    return write_page(found, folder / "rows.html", ids=True)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("of", ["report", "comparison", "rows"])
def test_it_can_be_read(request, tab, of, width, dark):
    tab.open(request.getfixturevalue(of).as_uri())
    seen = look(tab, width, dark)
    assert seen["texts"] > 20
    assert seen["page"] <= width
    assert seen["faint"] == []
    assert seen["images"] == 0
    assert seen["outside"] == []  # one file, nothing fetched
    assert tab.errors == []
