"""``examples/first_run.ipynb``: its cells run in their order, cut down to a tiny model and two steps."""

import json
import re

import pytest

from places import CHECKOUT
from typed import typed

NOTEBOOK = json.loads((CHECKOUT / "examples" / "first_run.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def text_of(cell):
    return "".join(cell["source"])


def tags_of(cell):
    return cell["metadata"].get("tags", [])


@pytest.mark.quick
def test_it_stores_no_output_and_has_magics_in_the_cell_that_installs_alone():
    assert [cell["outputs"] for cell in CODE] == [[] for _ in CODE]
    assert {cell["execution_count"] for cell in CODE} == {None}
    assert [tags_of(cell) for cell in CODE[:2]] == [["install"], ["parameters"]]
    install, *others = map(text_of, CODE)
    assert re.fullmatch(r'%pip install --quiet "lisatune-[\d.]+-py3-none-any.whl\[report\]"', install)
    assert [text for text in others if re.search(r"^\s*[%!]", text, re.MULTILINE)] == []


@pytest.mark.quick
@pytest.mark.parametrize("target", re.findall(r"\]\((\.\./[^)#]+)", json.dumps(NOTEBOOK)))
def test_its_links_lead_somewhere(target):
    assert (CHECKOUT / "examples" / target).exists()


def in_process(*words):
    """What ``lisatune`` of the notebook does, without a process, whose start takes seconds."""
    done = typed(*words)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("default")  # matplotlib's own
def test_its_cells_run_in_their_order(model_folder, tmp_path, monkeypatch, capsys):
    matplotlib = pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
    matplotlib.use("Agg")
    small = {"MODEL": str(model_folder), "FOLDER": str(tmp_path / "first_run"), "MAX_STEPS": 6, "BATCH_SIZE": 4}
    names = {}
    for cell in CODE[1:]:  # the first one installs, which the environment of the tests has behind it
        exec(compile(text_of(cell), cell["id"], "exec"), names)
        if "parameters" in tags_of(cell):
            assert set(small) <= set(names)
            names |= small
        elif "lisatune" in names and names["lisatune"] is not in_process:
            names["lisatune"]("--version")
            assert capsys.readouterr().out.startswith("lisatune ")
            with pytest.raises(RuntimeError, match="the command failed"):
                names["lisatune"]("plan")
            names["lisatune"] = in_process
    names["plt"].close("all")
    told = capsys.readouterr().out
    assert "held-out loss" in told
    assert (tmp_path / "first_run/run/summary.json").exists()
    assert names["trained"].num_parameters() > 0
    assert [step["step"] for step in names["learned"]] == [1, 2, 3, 4, 5, 6]
