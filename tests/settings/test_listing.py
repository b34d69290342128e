"""The reference of the settings: in the terminal, as JSON, as a page, as a schema."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lisatune import UserError
from lisatune.cli.app import app
from lisatune.settings import ROWS, TrainConfig
from lisatune.settings.config import GROUPS, heading
from lisatune.settings.listing import page, schema


def run(*words):
    result = CliRunner().invoke(app, ["settings", *words], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_json_has_every_setting_with_its_group_and_limits():
    entries = {entry["name"]: entry for entry in json.loads(run("--json"))}
    assert list(entries) == list(ROWS)
    assert entries["seed"]["default"] == 0
    assert entries["seed"]["values"] == "whole number from 0"
    assert entries["lora_use_dora"]["limits"] == "Only with method=lora, with dp_shard_size=1."
    assert entries["optim"]["limits"] == "Not with method=mezo."
    assert entries["num_train_epochs"]["limits"] == "Only without max_steps."
    assert entries["lora_r"]["group"] == "LoRA"
    assert entries["optim"]["values"].startswith("adamw, adamw_16bit")


def test_the_terminal_shows_groups_with_headings():
    shown = run()
    headings = [heading(group) for group in GROUPS]
    assert [line.strip() for line in shown.splitlines() if line.strip() in headings] == headings
    assert all(name in shown for name in ("lora_use_dora", "seed"))


def test_the_page_has_a_row_for_every_setting_in_tables_of_equal_width():
    rows = [line for line in page().splitlines() if line.startswith("| `")]
    assert [re.match(r"\| `(\w+)` ", line)[1] for line in rows] == list(ROWS)
    assert {line.count(" | ") for line in rows} == {3}
    assert run("--markdown") == page()


def test_the_schema_takes_what_the_settings_take():
    found = json.loads(run("--schema"))
    assert found == schema()
    assert set(found["properties"]) == set(TrainConfig.model_fields)
    assert "required" not in found  # a file may leave model, data and output to the command line
    assert found["properties"]["method"]["enum"] == ["lisa", "fixed", "badam", "lora", "full", "mezo"]


def test_one_form_at_a_time():
    with pytest.raises(UserError, match="three forms of one list: give one of them"):
        run("--json", "--schema")


def test_the_page_in_the_docs_is_current():
    """If not: ``lisatune settings --markdown > docs/settings.md``."""
    written = Path(__file__).parents[2] / "docs" / "settings.md"
    assert written.read_text(encoding="utf-8") == page()
