"""Tables, words and figures of recorded norms."""

import io
import json
import math
from xml.etree import ElementTree

import pytest
from rich.console import Console

from lisatune import UserError
from lisatune.study.study import MOST_COLUMNS, _columns, read_norms, show, skewness_of, study, tables, write_page

PARTS = ["embedding", "layers.0", "layers.1", "layers.2", "norm", "head"]


def write_run(folder, method="full", lines=None, name="run"):
    folder = folder / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"method: {method}\nlearning_rate: 0.0006\nmodel: m\n")
    (folder / "norms.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines or full_lines()))
    return folder


def line(step, norms, changes, mean=None, updates=None, **more):
    parts = {}
    for i, part in enumerate(PARTS):
        parts[part] = {"norm": norms[i], "change": changes[i]}
        parts[part] |= {"mean_norm": mean[i]} if mean else {}
        parts[part] |= {"updates": updates[i] if updates else step} | {key: value[i] for key, value in more.items()}
    return {"step": step, "parts": parts}


def full_lines():
    base = [100.0, 40.0, 40.0, 40.0, 9.0, 80.0]
    number = [400, 100, 100, 100, 1, 400]
    return [
        line(0, base, [0] * 6, base_norm=base, num_weights=number),
        line(10, [101.0, 41.0, 41.0, 41.0, 9.0, 81.0], [6.0, 4.0, 4.0, 3.0, 0.1, 5.0], mean=[101.0, 41.0, 41.0, 41.0, 9.0, 81.0]),
        line(20, [102.0, 42.0, 42.0, 42.0, 9.0, 82.0], [8.0, 5.0, 4.0, 3.0, 0.1, 6.0],
             mean=[101.5, 41.5, 41.5, 41.5, 9.0, 81.5], rank=[3.0] * 6, stable_rank=[2.0] * 6),
    ]  # fmt: skip


def lora_lines():
    """What untrained adapters have, and a change that is largest in a decoder layer."""
    start = [724.0, 17.0, 17.0, 17.0, None, 6.5]
    base, number = [100.0, 40.0, 40.0, 40.0, None, 80.0], [400, 100, 100, 100, 1, 400]
    end = [724.1, 17.5, 17.6, 17.7, None, 7.0]
    found = [
        line(0, start, [0] * 6, base_norm=base, num_weights=number, a_norm=start, b_norm=[0.0] * 6, adapter_change=[0.0] * 6),
        line(20, end, [1.0, 2.0, 2.2, 4.4, None, 1.5], mean=end, a_norm=start, b_norm=[1.0] * 6, adapter_change=[1.5, 2.0, 2.0, 3.0, None, 1.0]),
    ]  # fmt: skip
    for each in found:
        del each["parts"]["norm"]
    return found


def test_values_are_those_of_the_lines(tmp_path):
    told = study([read_norms(write_run(tmp_path))])
    [run] = told["runs"]
    assert (run["run"], run["method"], run["learning_rate"], run["steps"], run["recorded"]) == (
        "run",
        "full",
        6e-4,
        20,
        3,
    )
    row = run["layers"][0]
    assert (row["part"], row["start"], row["mean_norm"], row["end"]) == ("embedding", 100, 101.5, 102)
    assert (row["change"], row["relative_change"], row["change_per_weight"]) == (8, 0.08, 0.4)
    assert row["first_change"] == 6
    assert (row["growth"], row["rank"], row["stable_rank"], row["updates"]) == (1.5, 3, 2, 20)
    assert json.loads(json.dumps(told)) == told


def test_skewness_is_the_largest_over_the_median_decoder_layer():
    values = {"embedding": 12.0, "layers.0": 1.0, "layers.1": 2.0, "layers.2": 6.0, "head": 3.0}
    assert skewness_of(values) == {"ratio": 6.0, "largest": "embedding", "share": 15 / 24}
    assert skewness_of(values | {"layers.2": 20.0}) == {"ratio": 10.0, "largest": "layers.2", "share": 15 / 38}
    # layers that were never drawn have not moved, and say nothing of those that did
    assert skewness_of(values | {"layers.0": 0.0})["ratio"] == 3.0
    assert skewness_of({"embedding": 1.0, "layers.0": 0.0})["ratio"] is None
    assert skewness_of({"embedding": 0.0, "layers.0": 0.0}) == {"ratio": None, "largest": "embedding", "share": None}


def test_the_norm_has_no_part_in_skewness(tmp_path):
    lines = full_lines()
    for each in lines:
        each["parts"]["norm"] |= {"norm": 1e6, "change": 1e6}
    [told] = study([read_norms(write_run(tmp_path, lines=lines))])["runs"]
    assert told["skewness"]["change"]["largest"] == "embedding"
    assert told["layers"][4]["change"] == 1e6


def test_verdict_tells_the_skewness_with_and_without_step_0(tmp_path):
    lora = read_norms(write_run(tmp_path, "lora", lora_lines(), "LoRA"))
    told = study([lora, read_norms(write_run(tmp_path, name="full"))])
    verdict = told["runs"][0]["verdict"]
    assert (
        "by the paper's mean norm, it is skewed (embedding is the largest, 41.1 times the median decoder layer)"
        in verdict
    )
    assert "Before the first step, it is skewed (embedding is the largest, 42.6 times" in verdict
    assert "The mean of embedding is +0.0% from its value at step 0; furthest is that of head, +7.7%" in verdict
    assert "by the change of the weights, it is skewed (layers.2 is the largest, 2 times" in verdict
    assert "for each weight, it is skewed (layers.2 is the largest, 2 times" in verdict
    assert (
        "in relation to the size of its weights, it is not skewed (layers.0 is the largest, 1.25"
        in told["runs"][1]["verdict"]
    )
    assert "the paper's mean norm 41.1 in LoRA against 2.45 in full (17 times)" in told["verdict"]
    assert "change 2 in LoRA against 2 in full" in told["verdict"].replace(" of the weights", "")


def test_tables_have_the_columns_that_there_are_values_for(tmp_path):
    runs = [read_norms(write_run(tmp_path, "lora", lora_lines(), "LoRA")), read_norms(write_run(tmp_path, name="full"))]
    lora, full, skewness = tables(study(runs))
    assert "change of adapters" in lora[1]
    assert "change of adapters" not in full[1]
    assert "effective rank" in full[1]
    assert "effective rank" not in lora[1]
    assert [row[0] for row in full[2]] == PARTS
    assert full[2][0] == ["embedding", "100", "101.5", "102", "8", "8.000%", "0.4", "3", "2", "20"]
    assert skewness[1][1:] == ["LoRA", "full"]
    assert skewness[2][0] == ["the paper's mean norm", "41.1, embedding (93%)", "2.45, embedding (60%)"]
    console = Console(width=300, file=io.StringIO())
    console.print(show(study(runs)))
    assert "LoRA: lora, learning rate 0.0006, 20 steps" in console.file.getvalue()


def test_a_value_that_was_not_finite_is_a_gap(tmp_path):
    lines = full_lines()
    for each in lines[1:]:
        for key in ("norm", "change", "mean_norm"):
            del each["parts"]["layers.1"][key]
    run = read_norms(write_run(tmp_path, lines=lines))
    assert math.isnan(run.series("layers.1", "change")[1])
    told = study([run])
    assert told["runs"][0]["layers"][2]["change"] is None
    assert [row[5] for row in tables(told)[0][2]][:3] == ["8.000%", "12.500%", "-"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no norms.jsonl: train with norm_steps="),
        ({"norms.jsonl": ""}, "cannot be read"),
        ({"norms.jsonl": '{"step": 0}\n'}, "cannot be read"),
        ({"norms.jsonl": '{"step": 0, "parts": {}}\n{"step": 1e400, "parts": {}}\n\n'}, "cannot be read"),
        ({"norms.jsonl": "[" * 100_000 + "\n"}, "cannot be read"),
        (
            {"norms.jsonl": '{"step": 0, "parts": {}}\n' * 2 + '{"step": 1, "parts": {"head": {"updates": true}}}\n\n'},
            "cannot be",
        ),
        ({"norms.jsonl": '{"step": 0, "parts": {"head": {"norm": "1", "updates": 0}}}\n'}, "cannot be read"),
        ({"norms.jsonl": '{"step": 0, "parts": {"a": {"updates": 0}}}\n{"step": 1, "parts": {}}\n'}, "cannot be read"),
        ({"norms.jsonl": '{"step": 0, "parts": {}}\n'}, "does not hold step 0 and a later one"),
        ({"norms.jsonl": '{"step": 0, "parts": {"head": 3}}\n'}, "cannot be read"),
        ({"norms.jsonl": '{"step": 5, "parts": {}}\n{"step": 6, "parts": {}}\n'}, "does not hold step 0"),
        ({"norms.jsonl": "{}}\n"}, "cannot be read"),
        ({"norms.jsonl": '{"step": 0, "parts": {}}\n', "config.yaml": "[a"}, "cannot be read"),
        ({"norms.jsonl": '{"step": 0, "parts": {}}\n', "config.yaml": "3"}, "cannot be read"),
    ],
)
def test_what_is_no_record_is_refused_in_words(tmp_path, files, message):
    (tmp_path / "config.yaml").write_text("method: full\nlearning_rate: 1.0\n")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_norms(tmp_path)


def test_half_a_line_of_a_run_under_way_is_passed_over(tmp_path):
    folder = write_run(tmp_path)
    with (folder / "norms.jsonl").open("a") as file:
        file.write('{"step": 30, "parts": {"embed')
    assert read_norms(folder).steps == [0, 10, 20]


@pytest.mark.parametrize("number", [2, 3, MOST_COLUMNS + 1, MOST_COLUMNS + 2, 500])
def test_page_is_one_file_and_escapes_what_the_runs_hold(tmp_path, number):
    pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
    evil = "<script>$x_{$alert(1)"
    lines = [full_lines()[0], *({**full_lines()[1], "step": i} for i in range(1, number))]
    folder = write_run(tmp_path, "<b>lisa</b>", lines, evil)
    page = write_page(
        [read_norms(folder), read_norms(write_run(tmp_path, "lora", lora_lines(), "LoRA"))], tmp_path / "norms.html"
    ).read_text()
    assert "<script" not in page
    assert "<b>" not in page
    assert page.count("<svg") == 3
    for outside in ("src=", 'href="http', "@import", "<image"):
        assert outside not in page
    assert "currentColor" in page
    assert "color-scheme: light dark" in page
    for start in (i for i in range(len(page)) if page.startswith("<svg", i)):
        ElementTree.fromstring(page[start : page.index("</svg>", start) + 6])


@pytest.mark.parametrize("number", [2, 3, 60, 61, 62, 120, 122, 1000])
def test_heat_maps_have_the_first_and_the_last_step_and_no_more_columns_than_fit(number):
    columns = _columns(number)
    assert (columns[0], columns[-1]) == (0, number - 1)
    assert len(columns) <= MOST_COLUMNS + 1
    assert columns == sorted(set(columns))
    assert number > MOST_COLUMNS + 1 or columns == list(range(number))


def test_page_of_layers_that_never_moved(tmp_path):
    """Nothing to take a logarithm of."""
    pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
    lines = [line(step, [1.0] * 6, [0] * 6, mean=[1.0] * 6, updates=[0] * 6) for step in (0, 1)]
    run = read_norms(write_run(tmp_path, lines=lines))
    assert "no decoder layer has a value" in study([run])["runs"][0]["verdict"]
    assert write_page([run], tmp_path / "norms.html").read_text().count("<svg") == 2
