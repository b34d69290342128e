import io

import pytest
from rich.console import Console

from lisatune.evaluation.mt_bench.questions import Question
from lisatune.evaluation.mt_bench.scores import notes_of, score, show
from lisatune.evaluation.mt_bench.verdicts import Verdict

QUESTIONS = [
    Question(str(i), category, ("a", "b")) for i, category in enumerate(["writing", "maths", "writing", "maths"])
]


def verdicts(*grades):
    return [[Verdict(g, "" if g else "no grade") for g in pair] for pair in grades]


def test_means_and_errors_by_hand():
    told = score(QUESTIONS, verdicts((8, 6), (2, 4), (10, 10), (1, 1)))
    assert told["mean"] == (7 + 3 + 10 + 1) / 4
    # the questions 7, 3, 10, 1 have the variance (1.75² + 2.25² + 4.75² + 4.25²) / 3 = 16.25
    assert told["standard_error"] == pytest.approx((16.25 / 4) ** 0.5)
    assert (told["first_turn"], told["second_turn"]) == (5.25, 5.25)
    assert list(told["by_category"]) == ["writing", "maths"]
    assert told["by_category"]["writing"]["mean"] == 8.5
    assert told["by_category"]["maths"]["second_turn"] == 2.5
    assert told["num_unparsable"] == 0


def test_a_verdict_without_a_grade_is_counted_and_not_guessed():
    told = score(QUESTIONS, verdicts((8, None), (None, None), (10, 10), (1, 1)))
    assert told["mean"] == (8 + 10 + 1) / 3
    assert (told["num_questions"], told["num_verdicts"], told["num_unparsable"]) == (3, 8, 3)
    assert told["unparsable"] == {"no grade": 3}
    assert told["by_category"]["maths"] | {"by_category": None} == {
        "mean": 1.0, "standard_error": None, "first_turn": 1.0, "second_turn": 1.0, "num_questions": 1,
        "num_verdicts": 4, "num_unparsable": 2, "unparsable": {"no grade": 2}, "by_category": None,
    }  # fmt: skip


def test_no_grade_at_all():
    told = score(QUESTIONS, verdicts(*[(None, None)] * 4))
    assert (told["mean"], told["standard_error"], told["num_unparsable"]) == (None, None, 8)


def test_the_table():
    entries = [
        {"name": "[lisa]", "num_cut": 0} | score(QUESTIONS, verdicts((8, 6), (2, 4), (10, 10), (1, 1))),
        {"name": "lora", "num_cut": 3} | score(QUESTIONS, verdicts(*[(None, None)] * 4)),
    ]
    result = {"judge": {"model": "j"}, "num_questions": 4, "categories": ["writing", "maths"], "models": entries}
    result["notes"] = notes_of(result)
    console = Console(width=110, file=io.StringIO())
    console.print(show(result))
    text = console.file.getvalue()
    for expected in ("[lisa]", "8.50", "2.00", "5.25 ± 2.02", "0 of 8", "8 of 8", "lora: 8 verdicts without a grade",
                     "lora: 3 answers were cut", "not compared over the same questions"):  # fmt: skip
        assert expected in text
