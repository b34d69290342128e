"""`lisatune init`: a recipe to start from."""

import pytest

from lisatune.recipes import names
from lisatune.settings import build_config, read_settings
from places import CHECKOUT
from typed import typed


@pytest.mark.parametrize("name", names())
def test_a_recipe_is_written_with_comments_that_name_the_file(name, tmp_path):
    done = typed("init", name, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    text = (tmp_path / f"{name}.yaml").read_text()
    assert f"#   lisatune train --config {name}.yaml\n" in text
    assert "examples/" not in text  # a wheel has no such folder
    written = read_settings(str(tmp_path / f"{name}.yaml"), [])
    assert written == read_settings(str(CHECKOUT / "examples" / f"{name}.yaml"), [])
    build_config(written)


def test_another_place_is_quoted_in_the_comments(tmp_path):
    typed("init", "gsm8k", "--output", "my\n own.yaml", cwd=tmp_path)
    text = (tmp_path / "my\n own.yaml").read_text()
    assert "#   lisatune train --config 'my  own.yaml'\n" in text


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "gsm8k.yaml").write_text("precious")
    done = typed("init", "gsm8k", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "lisatune: gsm8k.yaml exists already, and nothing is overwritten: choose another --output\n",
    )
    assert (tmp_path / "gsm8k.yaml").read_text() == "precious"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [],
            "recipe is missing: choose one of continue, dpo, gsm8k, instructions, pubmedqa, as in lisatune init instructions",
        ),
        (["instruction"], "choose one of continue, dpo, gsm8k, instructions, pubmedqa; did you mean 'instructions'?"),
        (["../recipes/gsm8k"], "is not a recipe"),
        (["gsm8k", "--output", "nowhere/run.yaml"], "nowhere/run.yaml cannot be written (No such file or directory)"),
    ],
)
def test_refusals(words, message, tmp_path):
    done = typed("init", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []
