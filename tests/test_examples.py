"""Every example runs, is short, and its model learns."""

import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat and looked at the rat. " * 60)
    return path


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_under_sixty_lines(path):
    assert len(path.read_text().splitlines()) < 60


@pytest.mark.parametrize("name", ["own_loop", "hf_trainer"])
def test_loss_falls(name, model_folder, text_file):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    losses = __import__(name).main(str(model_folder), str(text_file), num_steps=12)
    assert len(losses) == 12
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("default")  # TRL warns of its own coming changes
def test_trl(model_folder, data_file):
    pytest.importorskip("trl", reason="the extra 'sft' is not installed")
    losses = __import__("trl_sft").main(str(model_folder), str(data_file), num_steps=12)
    assert len(losses) == 12
    assert losses[-1] < losses[0]
