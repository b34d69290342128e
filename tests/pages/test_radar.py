import re
import xml.etree.ElementTree as ElementTree

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
from lisatune.pages.radar import radar

CATEGORIES = ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"]


def lines_of(drawn, colour):
    """Corners of the line in ``colour``, from its first run of points, in SVG units."""
    path = re.search(rf'<path d="([^"]*)"[^>]*style="fill: none; stroke: {colour}', drawn)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path[1])]


def test_several_models_are_told_apart_and_named():
    drawn = radar(CATEGORIES, {"LISA": [7.0] * 8, "LoRA <r16> & $x_1$": [5.0] * 8})
    texts = {t.text for t in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")}
    assert {*CATEGORIES, "LISA", "LoRA <r16> & $x_1$"} <= texts
    assert "10" in texts  # the rim, whatever the scores
    assert "stroke-dasharray" in drawn  # not by colour alone
    assert 'aria-label="scores of LISA, LoRA &lt;r16&gt; &amp; $x_1$ by category"' in drawn


def test_corners_stand_where_the_scores_are():
    """On a scale from 0 at the middle to 10 at the rim, the first category at the top, clockwise."""
    corners = lines_of(radar(["a", "b", "c", "d"], {"m": [10.0, 5.0, 10.0, 2.5]}), "#3b82f6")
    (top, right, bottom, left), again = corners[:4], corners[4]
    assert again == pytest.approx(top, abs=0.01)
    x, y = (top[0] + bottom[0]) / 2, (top[1] + bottom[1]) / 2
    radius = y - top[1]
    assert radius > 50
    assert right == pytest.approx((x + radius / 2, y), abs=0.5)
    assert left == pytest.approx((x - radius / 4, y), abs=0.5)


def test_it_is_legible_on_white_and_on_black():
    drawn = radar(CATEGORIES, {"m": [5.0] * 8})
    assert "prefers-color-scheme:dark" in drawn
    assert "currentColor" in drawn
    assert not re.search(r"#(000000|ffffff|010203)", drawn)


def test_a_category_without_a_grade_is_a_gap():
    drawn = radar(["a", "b", "c", "d"], {"m": [1.0, None, 3.0, 4.0]})
    assert "nan" not in drawn
    assert len(lines_of(drawn, "#3b82f6")) == 4  # a; c, d, a
    assert "NaN" not in drawn
    assert radar(["a", "b", "c"], {"m": [None] * 3}).startswith("<svg")


def test_the_same_scores_are_the_same_file():
    assert radar(CATEGORIES, {"m": [5.0] * 8}) == radar(CATEGORIES, {"m": [5.0] * 8})
