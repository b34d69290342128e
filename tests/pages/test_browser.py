"""The pages as people see them: in a real browser, on a phone and on a desk, light and dark."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from lisatune.data.files import DataFile
from lisatune.data.inspection import Inspection, ShownRow
from lisatune.data.tokenize import Counts
from lisatune.data.view import write_page
from lisatune.run.report import write_report
from patience import HANG_SECONDS

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
if BROWSER is None:
    pytest.skip("no Chromium on this machine", allow_module_level=True)

# what a reader would notice: a page wider than the screen, text that can hardly be told from what is behind it, errors
LOOK = """
<script>
function parts(colour) { return colour.match(/[\\d.]+/g).map(Number) }
function brightness(c) {
  const [r, g, b] = c.map(x => (x /= 255) <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
  return .2126 * r + .7152 * g + .0722 * b
}
function behind(element) {
  for (let e = element; e; e = e.parentElement) {
    const c = parts(getComputedStyle(e).backgroundColor)
    if (c.length < 4 || c[3] > .5) return c
  }
  return matchMedia('(prefers-color-scheme: dark)').matches ? [18, 18, 18] : [255, 255, 255]
}
function shapeBehind(text) { // a figure's text stands on what was drawn before it, which is no parent of it
  const box = text.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2
  const shapes = [...text.closest('svg').querySelectorAll('path, use')].filter(shape => {
    const b = shape.getBoundingClientRect(), fill = getComputedStyle(shape).fill
    const before = shape.compareDocumentPosition(text) & Node.DOCUMENT_POSITION_FOLLOWING
    return before && fill != 'none' && b.left <= x && x <= b.right && b.top <= y && y <= b.bottom
  })
  return shapes.length ? parts(getComputedStyle(shapes.at(-1)).fill) : behind(text)
}
function contrast(element) {
  const style = getComputedStyle(element), svg = element instanceof SVGElement
  const [a, b] = [parts(svg ? style.fill : style.color), svg ? shapeBehind(element) : behind(element)].map(brightness)
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05)
}
const texts = [...document.querySelectorAll('h1, h2, p, li, td, th, pre, span, svg text')]
const faint = texts.filter(e => e.textContent.trim() && contrast(e) < 4.5)
const found = {
  dark: matchMedia('(prefers-color-scheme: dark)').matches,
  width: innerWidth, page: document.documentElement.scrollWidth, texts: texts.length,
  faint: faint.map(e => e.textContent.trim().slice(0, 40)),
  images: [...document.images].filter(i => !i.naturalWidth).length,
  outside: performance.getEntriesByType('resource').map(e => e.name),
}
parent.postMessage(JSON.stringify(found), '*')
</script>
"""
# a headless window is at least 500 wide, a frame in it is not
FRAME = """<!doctype html><html style="color-scheme: light dark"><body>
<script>onmessage = e => document.body.append(Object.assign(document.createElement('pre'), {id: 'look', textContent: e.data}))</script>
<iframe src="looked-at.html" style="width: %dpx; height: 900px; border: 0; color-scheme: light dark"></iframe>
"""


def look(page, width, dark):
    """Open ``page`` in a window and measure."""
    copy = page.with_name("looked-at.html")
    text = re.sub(
        r"<meta[^>]*Content-Security-Policy[^>]*>", "", page.read_text(encoding="utf-8")
    )  # ours would not run
    copy.write_text(text + LOOK, encoding="utf-8")
    frame = page.with_name("frame.html")
    frame.write_text(FRAME % width)
    words = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000", "--virtual-time-budget=3000", "--dump-dom",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--user-data-dir={page.parent / 'browser'}", frame.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANG_SECONDS)
    match = re.search(r'id="look">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:]
    return json.loads(unescape(match[1]))


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
        (0.3, 0.1), [ShownRow("rows.jsonl, line 1", text, list(range(99)), [-100] * 40 + list(range(59)))],
        ["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    return write_page(found, folder / "rows.html", ids=True)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("of", ["report", "comparison", "rows"])
def test_it_can_be_read(request, of, width, dark):
    seen = look(request.getfixturevalue(of), width, dark)
    assert seen["dark"] is dark
    assert seen["width"] == width
    assert seen["texts"] > 20
    assert seen["page"] <= seen["width"]
    assert seen["faint"] == []
    assert seen["images"] == 0
    assert seen["outside"] == []  # one file, nothing fetched
