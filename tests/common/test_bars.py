"""What is shown of a run's steps."""

import io

from rich.console import Console

from lisatune.common.bars import LINE_SECONDS, Step, training_bar


def shown(seconds, console, num_steps=None, first=1):
    """What is printed of steps that are done at ``seconds``, by the test's own clock."""
    times = iter(seconds)
    with training_bar(num_steps or len(seconds), console, clock=lambda: next(times)) as advance:
        for number, _ in enumerate(seconds, start=first):
            advance(Step(number, loss=2 / number, learning_rate=3e-4, speed=1234.4, layers=[0, 3]))
    return console.file.getvalue()


def test_in_a_file_a_line_comes_at_the_first_step_then_every_few_seconds_and_at_the_last():
    last = LINE_SECONDS + 1
    lines = shown([0, 1, LINE_SECONDS - 0.5, LINE_SECONDS, last, last], Console(file=io.StringIO())).splitlines()
    assert lines == [
        "step 1/6  loss 2.0000  learning rate 0.0003  1,234 tokens/s  layers 0,3",
        "step 4/6  loss 0.5000  learning rate 0.0003  1,234 tokens/s  layers 0,3  0:00:07 left",
        "step 6/6  loss 0.3333  learning rate 0.0003  1,234 tokens/s  layers 0,3",
    ]


def test_the_time_left_of_a_resumed_run_is_reckoned_from_its_own_steps():
    lines = shown([100, 100 + 2 * LINE_SECONDS], Console(file=io.StringIO()), num_steps=1000, first=900).splitlines()
    assert lines[1].endswith(f"  0:{99 * 2 * LINE_SECONDS // 60}:00 left")  # 99 steps of 20 s each


def test_a_dumb_terminal_gets_lines_and_another_one_a_bar():
    dumb = Console(file=io.StringIO(), force_terminal=True, width=200, _environ={"TERM": "dumb"})
    able = Console(file=io.StringIO(), force_terminal=True, width=200, _environ={"TERM": "xterm"})
    assert shown([0, 0], dumb).count("\n") == 2
    assert "━" in shown([0, 0], able)


def test_a_quiet_console_stays_quiet():
    assert shown([0, 0], Console(file=io.StringIO(), quiet=True)) == ""
