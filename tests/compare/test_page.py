"""The page of a comparison."""

from xml.etree import ElementTree

import pytest

from lisatune import UserError

pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
import re

from comparison_page import EVIL, page
from lisatune.compare.page import heat_map_names, write_comparison


def figures(text):
    return re.findall(r"<svg.*?</svg>", text, re.DOTALL)


def titles(text):
    return re.findall(r"<figcaption><b>(.*?)</b>", text)


def test_page_is_one_file_for_light_dark_and_phones(tmp_path):
    text = page(tmp_path, {"method": ["lisa", "full"], "learning_rate": [1e-4, 1e-3], "seed": [0, 1, 2]})
    assert titles(text) == [
        "Loss against tokens", "Loss against time", "Loss against memory", "Memory by part", "Loss against learning_rate",
    ]  # fmt: skip
    for outside in ("src=", 'href="http', "@import", "<script"):
        assert outside not in text
    for needed in ('name="viewport"', "prefers-color-scheme: dark", "color-scheme: light dark", "overflow-x: auto"):
        assert needed in text
    drawn = figures(text)
    assert len(drawn) == 5
    for figure in drawn:
        ElementTree.fromstring(figure)
        assert "currentColor" in figure
        assert "#000000" not in figure
        assert 'role="img" aria-label="' in figure
    assert text.count('<tr class="best">') == 1
    assert "learning_rate=0.001 is at the edge of the grid, the highest that was tried" in text
    assert "lisatune compare --model &#x27;models/&lt;b&gt;tiny&lt;i&gt;&#x27; --data d" in text


def test_everything_is_escaped(tmp_path):
    grid = {"decoder_name": [EVIL, "layers"], "method": ["lisa", "full"], "seed": [0, 1]}
    text = page(tmp_path, grid, failed=[2])
    assert "<script" not in text
    assert "<b>tiny" not in text
    assert text.count("&lt;script&gt;") >= 4
    assert "<title>lisa, full: &lt;b&gt;tiny&lt;i&gt;</title>" in text
    assert "step 3: $x_1$ &lt;script&gt;" in text
    for figure in figures(text):
        root = ElementTree.fromstring(figure)
        assert not root.findall(".//{*}script")
    assert ">lisa decoder_name=$x_1$ &lt;script&gt;a…</text>" in figures(text)[0]


def test_two_numbers_make_a_heat_map(tmp_path):
    text = page(tmp_path, {"method": ["lisa", "full"], "num_active": [1, 2, 4], "interval_steps": [1, 5]})
    assert titles(text)[-1] == "lisa: loss over num_active and interval_steps"
    heat_map = figures(text)[-1]
    for layers in (1, 2, 4):
        assert heat_map.count(f">{2.5 - 0.05 * layers - 0.005:.4f}<") == 2
    assert titles(page(tmp_path, {"num_active": [1, 2]}))[-1] == "Memory by part"


@pytest.mark.parametrize(
    ("varied", "names"),
    [
        ([{"a": 1, "b": 2.0}, {"a": 2, "b": 3.0}], ("a", "b")),
        ([{"a": 1, "b": True}, {"a": 2, "b": False}], None),
        ([{"a": 1, "b": "x"}, {"a": 2, "b": "y"}], None),
        ([{"a": 1}, {"a": 2}], None),
        ([{"a": 1, "b": 2, "c": 3}, {"a": 2, "b": 3, "c": 4}], None),
        ([{"a": 1, "b": 2, "c": 3}, {"a": 2, "b": 3, "c": 3}], ("a", "b")),
    ],
)
def test_what_a_heat_map_is_drawn_of(varied, names):
    assert heat_map_names([{"varied": v} for v in varied]) == names


def test_a_page_of_failures_and_one_without_a_comparison(tmp_path):
    text = page(tmp_path, {"method": ["lisa", "full"]}, failed=[0, 1])
    assert figures(text) == []
    assert text.count("<td>failed</td>") == 2
    with pytest.raises(UserError, match="holds no comparison to report on"):
        write_comparison(tmp_path / "nowhere")


def test_many_contenders_still_fit(tmp_path):
    text = page(tmp_path, {"num_active": [1, 2, 3, 4, 5, 6], "interval_steps": [1, 5], "learning_rate": [1e-4, 3e-4]})
    assert len(figures(text)) == 6
    for figure in figures(text):
        ElementTree.fromstring(figure)
