import json

import pytest

from lisatune.common.lines import drop_later_lines


def step_of(text):
    try:
        return json.loads(text)["step"]
    except ValueError:
        return None


LINES = ['{"step": 0}', '{"step":  1}', '{"step": 2}', '{"st']


@pytest.mark.parametrize(("num_steps", "kept"), [(0, []), (1, LINES[:2]), (2, LINES[:3]), (9, LINES[:3])])
def test_lines_of_later_steps_and_half_lines_go_and_the_others_keep_their_bytes(tmp_path, num_steps, kept):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(LINES))
    assert drop_later_lines(path, num_steps, step_of=step_of) == kept
    assert path.read_text() == "".join(line + "\n" for line in kept)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_file_that_is_not_there_stays_so(tmp_path):
    assert drop_later_lines(tmp_path / "a.jsonl", 3, step_of=step_of) == []
    assert list(tmp_path.iterdir()) == []
