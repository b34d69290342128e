import json
from xml.etree import ElementTree

import pytest

from lisatune import UserError

pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
from lisatune.evaluation.tasks.record import Conditions, Record
from lisatune.evaluation.tasks.score import Score
from lisatune.run.report import write_report

SUMMARY = {
    "method": "lisa", "steps": 2, "tokens": 10, "eval_loss_before": 2.0, "eval_loss_after": 1.0, "train_seconds": 3.0,
    "peak_bytes": 2**30, "state_bytes": 2**20,
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.yaml").write_text("method: lisa\nmodel: some/<b>model</b>\n")
    rows = [
        {"step": 0, "eval_loss": 2.0},
        {"step": 1, "loss": 1.5, "active_layers": [1, 3]},
        {"step": 2, "loss": 1.0, "eval_loss": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    return tmp_path


def test_report_is_one_file_and_escapes_what_the_data_holds(run):
    evil = "<script>alert(1)</script>"
    (run / "answers.json").write_text(json.dumps([{"question": evil, "expected": "", "before": evil, "after": evil}]))
    page = write_report(run).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 3
    assert "<b>model" not in page
    assert "2.0000 -&gt; 1.0000 (perplexity 7.389 -&gt; 2.718)" in page
    assert page.count("<svg") == 2
    for outside in ("src=", 'href="http', "@import"):
        assert outside not in page
    start = page.index("<svg")
    ElementTree.fromstring(page[start : page.index("</svg>", start) + 6])


def test_task_scores_are_shown(run):
    """As ``lisatune eval`` leaves them, with parts of a group and their change, and as they were while training."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row, value in zip(rows[::2], (0.25, 0.5), strict=True):
        row["scores"] = {"mmlu": value}
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    how, record = Conditions(4, None, True, None, "float32", "0.4.13"), Record()
    for model, values in (("some/<b>model</b>", (0.0, 0.0, 1.0, 1.0)), (f"{run}/model", (0.0, 1.0, 1.0, 1.0))):
        part = Score("acc", sum(values) / 4, 0.25, 4, values=values)
        record.add(
            model,
            "mmlu",
            how,
            {"mmlu": Score("acc", sum(values) / 4, 0.25, 4, 2, parts={"anatomy": part}, values=values)},
        )
    record.write(run, ["some/<b>model</b>", f"{run}/model"])
    page = write_report(run).read_text()
    assert page.count("<svg") == 3
    row = "<td>0.500 ± 0.250</td><td>0.750 ± 0.250</td><td>+0.250 ± 0.250</td></tr>"
    assert f"<td>mmlu</td><td>acc, the first 4, 2 examples before each</td><td>4</td>{row}" in page
    assert f"<td>- anatomy</td><td>acc</td><td>4</td>{row}" in page


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no finished run"):
        write_report(tmp_path)
