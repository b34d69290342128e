"""``report.html`` of a run: one self-contained file."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

import yaml

from lisatune.common.amounts import gib
from lisatune.common.files import write_whole
from lisatune.common.loss_names import told
from lisatune.errors import UserError
from lisatune.evaluation.tasks.record import Record
from lisatune.evaluation.tasks.score import Score, difference
from lisatune.evaluation.tasks.table import with_error
from lisatune.pages.plots import active_layers, loss_curve, score_curve

# all text is escaped; the policy is a second lock, under which a browser runs no script and loads nothing
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem }}
svg {{ width: 100%; height: auto }}
table {{ border-collapse: collapse; width: 100% }} .scroll {{ overflow-x: auto }}
td, th {{ text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8884; vertical-align: top }}
pre {{ overflow-x: auto; padding: .8rem; background: #8882; border-radius: .4rem }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


SCORE_COLUMNS = ["task", "metric", "n", "before", "after", "difference"]
SCORE_NOTE = "<p>n: documents; ±: one standard error, of a difference document by document where both are known.</p>"


def write_report(folder: Path) -> Path:
    """Draw the run in ``folder`` from its config.yaml, metrics.jsonl and summary.json; needs matplotlib.

    All text of the run is escaped. Shown where present: scores that ``lisatune eval`` left in ``scores.json``, and
    ``answers.json`` (question, expected, before, after).

    Raises: UserError if ``folder`` holds no finished run.
    """
    try:
        page = _draw(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: holds no finished run to report on ({type(error).__name__}: {error})") from error
    path = folder / "report.html"
    write_whole(path, page.encode(errors="replace").decode())  # JSON may hold half a character, UTF-8 may not
    return path


def _draw(folder: Path) -> str:
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    body = [_table(["", ""], _headline(summary)), "<h2>Loss</h2>", loss_curve(rows)]
    if any("active_layers" in row for row in rows):
        body += ["<h2>Layers in training</h2>", active_layers(rows)]
    if any(row.get("scores") for row in rows):
        body += ["<h2>Task scores while training</h2>", score_curve(rows)]
    if scores := _scores(folder, str(config["model"])):
        body += ["<h2>Task scores before and after</h2>", _table(SCORE_COLUMNS, scores), SCORE_NOTE]
    if (folder / "answers.json").exists():
        answers = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
        body += ["<h2>Answers to questions worded as in no training row</h2>"]
        body += [_table(["question", "before", "after"], [[a["question"], a["before"], a["after"]] for a in answers])]
    settings = yaml.safe_dump(config, sort_keys=False)
    body += [
        f"<h2>Settings</h2><p>Repeat with <code>lisatune train --config config.yaml</code> and another output.</p><pre>{escape(settings)}</pre>"
    ]
    return PAGE.format(title=escape(f"{config['method']}: {Path(str(config['model'])).name}"), body="\n".join(body))


def _scores(folder: Path, base: str) -> list[list[str]]:
    """A row for each task, and for each part of one that is a group."""
    record = Record()
    record.read(folder)
    rows = []
    for conditions, task, before, after in record.pairs(base):
        first = "" if conditions.limit is None else f", the first {conditions.limit}"
        metric = f"{after.metric}{first}, {after.num_fewshot} examples before each"
        rows.append([task, metric, *_change(before, after)])
        for name, part in after.parts.items():
            rows.append([f"- {name}", part.metric, *_change(before.parts.get(name) if before else None, part)])
    return rows


def _change(before: Score | None, after: Score) -> list[str]:
    told = [f"{after.num_documents:,}", "", with_error(after.value, after.stderr), ""]
    if before is not None:
        change = difference(before, after)
        told[1] = with_error(before.value, before.stderr)
        told[3] = with_error(change["value"], change["stderr"], signed=True)
    return told


def _headline(summary: dict[str, Any]) -> list[list[str]]:
    rows = [
        ["method", summary["method"]],
        ["optimizer steps", f"{summary['steps']:,}"],
        ["tokens", f"{summary['tokens']:,}"],
    ]
    rows += [[label, text] for label, text in told(summary)]
    rows.append(["time", f"{summary['train_seconds']:.0f} s with evaluation"])
    base = summary.get("base_bytes", 0)  # runs of earlier versions have no forecast
    forecast = f"; predicted were {gib(summary['planned_peak_bytes'])}" if "planned_peak_bytes" in summary else ""
    beside = f", and {gib(base)} of the process beside it" if base else ""
    rows.append(["peak memory", f"{gib(summary['peak_bytes'] - base)}{forecast}{beside}"])
    rows.append(["optimizer state", gib(summary["state_bytes"])])
    return rows


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    heading = "".join(f"<th>{escape(h)}</th>" for h in head) if any(head) else ""
    return f'<div class="scroll"><table><tr>{heading}</tr>{cells}</table></div>'
