import json
from collections import Counter

import pytest

from lisatune.errors import UserError
from lisatune.evaluation.mt_bench.questions import Question, read_questions


@pytest.fixture
def written(tmp_path):
    def write(*rows, name="questions.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def row(number=1, **columns):
    return {"question_id": number, "category": "maths", "turns": ["1+1?", "And 2+2?"]} | columns


def test_the_real_questions_and_references(shared):
    folder = shared / "data/mt_bench"
    questions = read_questions(str(folder / "question.jsonl"), str(folder / "reference_answer_gpt-4.jsonl"))
    assert Counter(q.category for q in questions) == dict.fromkeys(
        ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"], 10
    )
    assert {q.category for q in questions if q.references} == {"reasoning", "math", "coding"}
    assert sum(len(q.references) == 2 for q in questions) == 30
    assert questions[20].references[0].startswith("If you have just overtaken the second person")


def test_the_notes_in_the_real_questions_stand_in_for_references(shared):
    questions = read_questions(str(shared / "data/mt_bench/question.jsonl"))
    assert sum(bool(q.references) for q in questions) == 39
    assert next(q for q in questions if q.id == "109").references == ("West", "South.")


def test_a_limit_takes_from_each_category(shared):
    questions = read_questions(str(shared / "data/mt_bench/question.jsonl"), limit=9)
    assert [q.id for q in questions] == ["81", "82", "91", "101", "111", "121", "131", "141", "151"]


def test_the_form_of_the_hub(written):
    path = written({"prompt_id": 7, "category": "coding", "prompt": ["a", "b"], "reference": ["c", "d"]})
    assert read_questions(path) == [Question("7", "coding", ("a", "b"), ("c", "d"))]
    assert read_questions(written(row(reference=[])))[0].references == ()


def test_a_file_of_references_takes_the_place_of_notes_and_may_know_more_questions(written):
    questions = written(row(1, reference=["old", "old"]), row(2, reference=["old", "old"]))
    answers = [{"question_id": n, "choices": [{"turns": [f"{n}a", f"{n}b"]}]} for n in (1, 3)]
    found = read_questions(questions, written(*answers, name="references.jsonl"))
    assert [q.references for q in found] == [("1a", "1b"), ()]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no questions"),
        ([row(turns=["alone"])], "line 1: 'turns' must be a list of 2 texts"),
        ([row(turns=["a", " "])], "line 1: 'turns' must be a list of 2 texts, none of them empty"),
        ([row(turns="a b")], "line 1: 'turns' must be a list of texts, one for each turn"),
        ([row(), row(2, turns=["a", 3])], "line 2: 'turns' must be a list of texts"),
        ([row(category=None)], "line 1: 'category' must be a word"),
        ([row(), row()], "line 2: question_id 1 is in the file twice"),
        ([row(True)], "line 1: 'question_id' must be a number or a name"),
        ([{"q": 1}], "line 1: 'category' must be a word"),
        ([row(turns=["a", "\ud800"])], "line 1: 'turns' holds half of a character"),
    ],
)
def test_bad_rows_are_told_by_their_place(written, rows, message):
    with pytest.raises(UserError, match=message):
        read_questions(written(*rows))


def test_bad_references(written):
    with pytest.raises(UserError, match="references.jsonl, line 1: 'choices' must be a list of answers"):
        read_questions(written(row()), written({"question_id": 1, "answer": "x"}, name="references.jsonl"))
