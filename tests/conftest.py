"""Fixtures: tiny models, small data, and the real data and models that may stand next to a checkout."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# equal sums get equal bits on every processor; MKL reads it before its first product, and processes of tests inherit it
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
os.environ["OMP_NUM_THREADS"] = "1"  # two threads add up in another order than one

import pytest
import torch
from hypothesis import HealthCheck, settings

from places import SHARED
from tiny import make_llama, make_tokenizer, write_rows

torch.set_num_threads(1)  # models this small gain nothing from more, and two test processes share two cores


# a busy machine is slow, not wrong
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


# what is run while one works: rooms and files whose tests take milliseconds, and most of the arithmetic
QUICK = (
    "settings/", "samplers/", "data/", "levers/test_inverse_chance", "levers/test_frozen_steps", "optim/test_rounding",
    "levers/test_optimizer_in_backward", "run/test_checkpoint", "test_engine", "test_layers", "test_learner", "test_loss",
    "test_pieces", "test_structure",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the quick tests, which ``make check`` runs."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and str(item.path.relative_to(here)).startswith(QUICK):
            item.add_marker(pytest.mark.quick)


@pytest.fixture
def llama() -> Any:
    return make_llama()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model with its tokenizer, as a user has one."""
    folder = tmp_path_factory.mktemp("model")
    make_llama(vocab_size=len(make_tokenizer())).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """Sixty short questions and answers."""
    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is such a thing: flushing every file to a disk takes most of some tests' time."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="lisatune-test-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED.name}/ beside the checkout: real data and models are not here")
    return SHARED


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)
