"""``report.html`` of a run: one self-contained file."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

import yaml

from lisatune.common.amounts import gib, peak_of
from lisatune.common.files import write_whole
from lisatune.common.loss_names import ending_lines, loss_lines
from lisatune.errors import UserError
from lisatune.evaluation.tasks.record import Record
from lisatune.evaluation.tasks.score import Score, difference
from lisatune.evaluation.tasks.table import with_error
from lisatune.pages.html import html_page, html_table
from lisatune.pages.plots import active_layers, loss_curve, score_curve
from lisatune.run.profile import head_of, note_of, read_profile, rows_of

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
    unit = f"of task={summary['task']}" if "task" in summary else "nats per token"
    body = [html_table(["", ""], _headline(summary)), "<h2>Loss</h2>", loss_curve(rows, unit)]
    if any("active_layers" in row for row in rows):
        body += ["<h2>Layers in training</h2>", active_layers(rows)]
    if any(row.get("scores") for row in rows):
        body += ["<h2>Task scores while training</h2>", score_curve(rows)]
    if profiled := read_profile(folder):
        body += [
            "<h2>Where a step's time goes</h2>",
            html_table(head_of(profiled), rows_of(profiled)),
            f"<p>{escape(note_of(profiled))}</p>",
        ]
    if scores := _scores(folder, str(config["model"])):
        body += ["<h2>Task scores before and after</h2>", html_table(SCORE_COLUMNS, scores), SCORE_NOTE]
    if (folder / "samples.jsonl").is_file():
        lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        body += ["<h2>Answers while training</h2>", *_samples([json.loads(line) for line in lines])]
    if (folder / "answers.json").exists():
        answers = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
        body += ["<h2>Answers to questions worded as in no training row</h2>"]
        body += [
            html_table(["question", "before", "after"], [[a["question"], a["before"], a["after"]] for a in answers])
        ]
    settings = yaml.safe_dump(config, sort_keys=False)
    body += [
        f"<h2>Settings</h2><p>Repeat with <code>lisatune train --config config.yaml</code> and another output.</p><pre>{escape(settings)}</pre>"
    ]
    return html_page(f"{config['method']}: {Path(str(config['model'])).name}", body)


def _samples(lines: list[dict[str, Any]]) -> list[str]:
    """The first and the newest answer to each prompt, and all of them, folded away."""
    of_prompts: dict[str, list[list[str]]] = {}
    for line in lines:
        of_prompts.setdefault(str(line["prompt"]), []).append([f"{line['step']:,}", str(line["answer"])])
    head = ["prompt", "before training", f"after step {max((line['step'] for line in lines), default=0):,}"]
    pairs = [[prompt, answers[0][1], answers[-1][1]] for prompt, answers in of_prompts.items()]
    every = [html_table(["step", prompt], answers) for prompt, answers in of_prompts.items()]
    return [html_table(head, pairs), f"<details><summary>All answers</summary>{''.join(every)}</details>"]


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
    cells = [f"{after.num_documents:,}", "", with_error(after.value, after.stderr), ""]
    if before is not None:
        change = difference(before, after)
        cells[1] = with_error(before.value, before.stderr)
        cells[3] = with_error(change["value"], change["stderr"], signed=True)
    return cells


def _headline(summary: dict[str, Any]) -> list[list[str]]:
    rows = [["task", summary["task"]]] if "task" in summary else []
    rows += [
        ["method", summary["method"]],
        ["optimizer steps", f"{summary['steps']:,}"],
        ["tokens", f"{summary['tokens']:,}"],
    ]
    rows += [[label, text] for label, text in [*ending_lines(summary), *loss_lines(summary)]]
    rows.append(["time", f"{summary['train_seconds']:.0f} s with evaluation"])
    rows.append(["peak memory", peak_of(summary)])
    rows.append(["optimizer state", gib(summary["state_bytes"])])
    return rows
