import threading
import time

import pytest

from judge_server import Server, completion
from lisatune.errors import UserError
from lisatune.evaluation.mt_bench.endpoint import LONGEST_WAIT_SECONDS, Endpoint
from lisatune.evaluation.mt_bench.judge import NUM_THREADS, Judge
from lisatune.evaluation.mt_bench.records import Records
from patience import HANG_SECONDS, wait_until

PROMPTS = [f"prompt {i}" for i in range(12)]


@pytest.fixture
def judge(memory_path):
    """A judge at ``server``; each call is a new process's view of the same folder."""
    opened = []

    def make(server, **settings):
        endpoint = Endpoint(server.url, settings.pop("model", "judge"), backoff_seconds=0.01, **settings)
        opened.append(endpoint)
        return Judge(endpoint, Records(memory_path / "replies.jsonl"))

    yield make
    for endpoint in opened:
        endpoint.close()


def asked(server):
    return [body["messages"][0]["content"] for body in server.posts]


def graded(number, body):
    return completion(f"Grade: [[{int(body['messages'][0]['content'].split()[1]) % 10 + 1}]]")


GRADES = [i % 10 + 1 for i in range(12)]


def test_every_prompt_has_its_own_verdict_and_is_asked_once(judge):
    came = []
    with Server(graded) as server:
        verdicts = judge(server).verdicts(PROMPTS, lambda: came.append(1))
        assert [v.grade for v in verdicts] == GRADES
        assert [v.grade for v in judge(server).verdicts(PROMPTS)] == GRADES
    assert sorted(asked(server)) == sorted(PROMPTS)
    assert len(came) == 12


def test_equal_prompts_are_asked_once(judge):
    with Server(graded) as server:
        assert [v.grade for v in judge(server).verdicts(["prompt 3"] * 5)] == [4] * 5
    assert len(server.posts) == 1


def test_a_reply_without_a_grade_is_paid_for_once_too(judge):
    with Server(lambda number, body: completion("I cannot say.")) as server:
        for _ in range(2):
            assert [v.reason for v in judge(server).verdicts(PROMPTS[:2])] == ["no grade"] * 2
    assert len(server.posts) == 2


def test_a_reply_that_was_cut_off(judge):
    with Server(lambda number, body: completion("[[7]] for", "length")) as server:
        assert judge(server).verdicts(["prompt 1"])[0].reason == "cut off"


def test_another_judge_is_asked_anew(judge):
    with Server(graded) as server:
        for model in ("small", "large"):
            judge(server, model=model).verdicts(PROMPTS[:1])
    assert [body["model"] for body in server.posts] == ["small", "large"]


def test_the_budget_stops_it_and_the_same_call_goes_on(judge):
    with Server(graded) as server:
        for left in (7, 2):
            with pytest.raises(
                UserError, match=f"budget of 5 requests is spent, with {left} verdicts left: run the same command"
            ):
                judge(server, budget=5).verdicts(PROMPTS)
        assert [v.grade for v in judge(server, budget=5).verdicts(PROMPTS)] == GRADES
        with pytest.raises(UserError, match="budget of 0 requests"):
            judge(server, budget=0).verdicts(["prompt 99"])
    assert sorted(asked(server)) == sorted(PROMPTS)


def test_an_endpoint_that_breaks_down_loses_no_reply(judge):
    with Server(lambda number, body: graded(number, body) if number <= 6 else (401, {}, b"expired")) as server:
        with pytest.raises(UserError, match="does not accept the key"):
            judge(server).verdicts(PROMPTS)
        done = judge(server)
        assert 12 - len(done.missing(PROMPTS)) == len(done.replies) == 6
        assert len(server.posts) <= 6 + NUM_THREADS  # those that were under way, and none after them
    with Server(graded) as again:
        server.url = again.url
        assert [v.grade for v in judge(again).verdicts(PROMPTS)] == GRADES


def test_a_prompt_that_is_refused_is_counted_and_the_others_go_on(judge):
    def behave(number, body):
        return (400, {}, b"too long") if body["messages"][0]["content"] == "prompt 5" else graded(number, body)

    with Server(behave) as server:
        judge(server).verdicts(PROMPTS[:1])
        verdicts = judge(server).verdicts(PROMPTS)
        assert [v.grade for v in verdicts] == [g if i != 5 else None for i, g in enumerate(GRADES)]
        assert verdicts[5].reason == "refused"


def test_a_judge_that_refuses_everything_is_told_of(judge):
    with Server(lambda number, body: (400, {}, b"temperature is not supported")) as server:
        with pytest.raises(UserError, match="refuses the request .*temperature is not supported"):
            judge(server).verdicts(PROMPTS)
        assert len(server.posts) <= 2 * NUM_THREADS


def test_a_few_at_a_time(judge):
    """The first ones are answered when all of them are there; who comes while they wait is counted."""
    all_there, lock, now, most = threading.Barrier(NUM_THREADS, timeout=HANG_SECONDS), threading.Lock(), [0], [0]

    def behave(number, body):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        if number <= NUM_THREADS:
            all_there.wait()
        with lock:
            now[0] -= 1
        return graded(number, body)

    with Server(behave) as server:
        judge(server).verdicts(PROMPTS)
    assert most[0] == NUM_THREADS


def test_after_a_failure_nobody_waits_to_send_more(judge):
    """The last of those that are sent at once fails when the others have begun to wait as long as they may be told to."""
    all_there, waits = threading.Barrier(NUM_THREADS, timeout=HANG_SECONDS), []

    def behave(number, body):
        all_there.wait()
        if number < NUM_THREADS:
            return 429, {"Retry-After": str(LONGEST_WAIT_SECONDS)}, b"slow down"
        wait_until(lambda: len(waits) == NUM_THREADS - 1)
        return 401, {}, b"expired"

    began = time.monotonic()
    with Server(behave) as server, pytest.raises(UserError, match="does not accept the key"):
        judge(server, tell=waits.append).verdicts(PROMPTS)
    assert time.monotonic() - began < LONGEST_WAIT_SECONDS
