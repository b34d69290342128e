"""What a run says about bfloat16 on a CPU."""

from types import SimpleNamespace

import pytest
import torch

from lisatune.run import faster_type
from lisatune.settings import build_config

CPU = torch.device("cpu")


def told(width=512, inner=1024, device=CPU, **settings):
    text = SimpleNamespace(hidden_size=width, intermediate_size=inner)
    config = build_config({"model": "m", "data": "d", "output": "o"} | settings)
    return faster_type.advice(config, device, SimpleNamespace(get_text_config=lambda: text))


@pytest.fixture
def measured(monkeypatch):
    """The trial's answer, so that no test depends on time; and what it was asked."""
    asked = []
    answer = {"share": 0.25}
    monkeypatch.setattr(faster_type, "share_of_time", lambda *shape: asked.append(shape) or answer["share"])
    return answer, asked


def test_it_is_told_where_products_are_clearly_faster(measured):
    answer, asked = measured
    assert "products take 0.25 of the time" in told()
    assert "products take 0.25 of the time" in told(width=8192, inner=28672)
    assert asked == [(512, 1024), (1024, 4096)]
    answer["share"] = 0.9
    assert told() == ""


@pytest.mark.parametrize(
    "case",
    [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"full_determinism": True}, {"width": 64}, {"width": None},
     {"device": torch.device("meta")}],
    ids=str,
)  # fmt: skip
def test_nothing_is_tried_for_who_chose_or_has_a_small_model(case, measured):
    assert told(**case) == ""
    assert measured[1] == []
