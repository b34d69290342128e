"""Rows of judged answers: every form that is read, and what is refused."""

import pytest

from lisatune import UserError
from lisatune.data.formats import Row
from lisatune.data.preferences import JudgedParser

USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
PAIRS = JudgedParser()
LABELLED = JudgedParser(wanted=("completion", "label"))


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"question": "q", "chosen": "a", "rejected": "b"},
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": '[{"role": "user", "content": "q"}]', "chosen": "a", "rejected": "b"},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
         "rejected": {"from": "gpt", "value": "b"}},
    ],
    ids=lambda columns: " ".join(columns),
)  # fmt: skip
def test_pairs_in_all_their_forms(columns):
    judged = PAIRS(Row("f", columns))
    assert judged.as_row() == {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    assert judged.left_out == ()


def test_what_stands_beside_a_pair():
    system = {"system": "S", "prompt": "q", "chosen": "a", "rejected": "b", "source": "x", "margin": 2}
    judged = PAIRS(Row("f", system))
    assert [turn["role"] for turn in judged.messages] == ["system", "user"]
    assert judged.left_out == ("source", "margin")
    assert JudgedParser(wanted=("chosen", "rejected", "margin"))(Row("f", system)).as_row()["margin"] == 2.0
    renamed = JudgedParser({"prompt": "x", "chosen": "y"}, {"bot": "assistant"})
    row = Row("f", {"x": "q", "y": {"role": "bot", "content": "a"}, "rejected": "b"})
    assert renamed(row).as_row() == {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    json = PAIRS(Row("f", {"prompt": "list", "chosen": "[1, 2]", "rejected": '{"a": 1}'}))
    assert json.answers["chosen"][0]["content"] == "[1, 2]"


@pytest.mark.parametrize(("label", "good"), [(True, True), (0, False), ("False", False), ("1", True)])
def test_labels(label, good):
    assert LABELLED(Row("f", {"prompt": "q", "completion": "a", "label": label})).label is good


@pytest.mark.parametrize(
    ("parser", "columns", "message"),
    [
        (PAIRS, {"prompt": "q", "completion": "a", "label": True}, "'chosen' is missing.*the columns of task=kto"),
        (LABELLED, {"prompt": "q", "chosen": "a", "rejected": "b"}, "'completion' is missing.*the columns of task=dpo, orpo"),
        (PAIRS, {"text": "q"}, "'chosen' is missing.*this row has the columns text.*columns={chosen: NAME}"),
        (PAIRS, {"chosen": "a", "rejected": "b"}, "there is no prompt"),
        (PAIRS, {"prompt": "q", "chosen": [USER], "rejected": [BAD]}, "'chosen' is no answer to the prompt"),
        (PAIRS, {"prompt": "q", "chosen": None, "rejected": "b"}, "'chosen' is missing or null, but must be a string"),
        (LABELLED, {"prompt": "q", "completion": "a", "label": 2}, "'label' is 2, but must be true"),
        (JudgedParser(wanted=("chosen", "rejected", "margin")),
         {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "x"}, "'margin' is x, but must be a number"),
    ],
)  # fmt: skip
def test_refusals_name_the_place_and_the_remedy(parser, columns, message):
    with pytest.raises(UserError, match=f"^rows.jsonl, line 3: {message}"):
        parser(Row("rows.jsonl, line 3", columns))
