"""Against real servers that misbehave over a real socket."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from judge_server import Server, completion
from lisatune.errors import UserError
from lisatune.evaluation.mt_bench.endpoint import TRIES, BudgetSpent, Endpoint, RequestRefused, check_key, check_url
from patience import HANG_SECONDS, wait_until

BODY = {"messages": [{"role": "user", "content": "Grade this."}], "temperature": 0}
HTML = (200, {"Content-Type": "text/html"}, b"<html><body>Welcome to \x1b[31mnginx</body></html>")


@pytest.fixture
def ask():
    """Asks a server once, with short waits; returns the answer, the server, and what was told of waits."""

    def run(behave, **settings):
        told = []
        with Server(behave) as server:
            endpoint = Endpoint(server.url, "judge", backoff_seconds=0.01, tell=told.append, **settings)
            try:
                return endpoint.ask(BODY), server, told
            except Exception as error:
                error.server = server
                raise
            finally:
                server.let_go.set()
                endpoint.close()

    return run


def after(*answers):
    """The answers one after another, the last one again and again."""
    return lambda number, body: answers[min(number, len(answers)) - 1]


def test_a_reply_and_what_was_sent_for_it(ask):
    answer, server, told = ask(after(completion("Grade: [[7]]")), key="secret")
    assert (answer["reply"], answer["finish_reason"], told) == ("Grade: [[7]]", "stop", [])
    assert answer["usage"] == {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    assert server.posts == [{"model": "judge", **BODY}]
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_without_a_key_none_is_sent(ask):
    assert "Authorization" not in ask(after(completion("x")))[1].headers[0]


def test_a_model_that_says_nothing_has_said_nothing(ask):
    assert ask(after(completion(None)))[0]["reply"] == ""


def test_retry_after_is_honoured(ask):
    began = time.monotonic()
    answer, server, told = ask(after((429, {"Retry-After": "1"}, b"slow down"), completion("x")))
    assert time.monotonic() - began >= 1
    assert (answer["reply"], len(server.posts), told) == ("x", 2, ["status 429: slow down: waiting 1 s"])


def test_a_wait_without_end_is_told_of_at_once(ask):
    with pytest.raises(UserError, match="asks you to wait 86,400 s") as caught:
        ask(after((429, {"Retry-After": "86400"}, b"")))
    assert len(caught.value.server.posts) == 1


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 529])
def test_a_fault_that_passes(ask, status):
    answer, server, _ = ask(after((status, {}, b"later"), (status, {}, b"later"), completion("x")))
    assert (answer["reply"], len(server.posts)) == ("x", 3)


@pytest.mark.parametrize(
    "nonsense",
    [
        HTML,
        (200, {}, b""),
        (200, {}, b"{}"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b'{"choices": [{"message": {}}]}'),
        (200, {}, b'{"choices": [{"message": {"content": 7}}]}'),
        (200, {}, b'{"choices": "none"}'),
        (200, {}, b"[" * 100_000),
        (200, {}, b"null"),
        (200, {}, b"\xff\xfe"),
        (200, {"Content-Encoding": "gzip"}, b"not gzip"),
        (200, {"Content-Length": "1000"}, b"broken off"),
    ],
)
def test_an_answer_that_is_no_chat_completion_is_tried_again(ask, nonsense):
    answer, server, _ = ask(after((500, {}, b""), nonsense, completion("x")))
    assert (answer["reply"], len(server.posts)) == ("x", 3)


def test_nonsense_that_stays_is_one_safe_sentence(ask):
    with pytest.raises(
        UserError, match=f"gave no answer in {TRIES} tries .status 200, but no chat completion.*nginx"
    ) as caught:
        ask(after(HTML))
    assert len(caught.value.server.posts) == TRIES
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "does not accept the key"),
        (403, "does not accept the key"),
        (404, "does not exist or has no model judge"),
        (405, "does not exist or has no model judge"),
        (301, "does not exist or has no model judge"),
    ],
)
def test_what_no_retry_can_mend_is_not_tried_again(ask, status, message):
    with pytest.raises(UserError, match=message) as caught:
        ask(after((status, {"Location": "http://127.0.0.1:9/"}, b"no")), key="secret")
    assert len(caught.value.server.posts) == 1
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_is_refused(ask, status):
    with pytest.raises(RequestRefused, match="the prompt is too long") as caught:
        ask(after((status, {}, b"the prompt is too long")))
    assert len(caught.value.server.posts) == 1


def test_fields_that_a_model_does_not_take_are_replaced_once_and_for_all():
    """As the models of OpenAI that think before they answer refuse them."""

    def behave(number, body):
        for name, advice in (
            ("max_tokens", "Use 'max_completion_tokens' instead."),
            ("temperature", "Only 1 is supported."),
        ):
            if name in body:
                error = {"message": f"Unsupported: '{name}'. {advice}", "param": name, "code": "unsupported_parameter"}
                return 400, {}, json.dumps({"error": error}).encode()
        return completion("x")

    body = {"messages": [], "temperature": 0, "max_tokens": 9}
    with Server(behave) as server:
        endpoint = Endpoint(server.url, "judge")
        assert endpoint.ask(body)["left_out"] == ["max_tokens", "temperature"]
        endpoint.ask(body)
        endpoint.close()
    assert len(server.posts) == 4
    assert server.posts[2] == server.posts[3] == {"model": "judge", "messages": [], "max_completion_tokens": 9}


@pytest.mark.parametrize(
    "error", ["[]", '{"error": "no"}', '{"error": {"param": {}}}', '{"error": {"param": "messages"}}']
)
def test_a_refusal_for_another_reason_stays_one(ask, error):
    with pytest.raises(RequestRefused) as caught:
        ask(after((400, {}, error.encode())))
    assert len(caught.value.server.posts) == 1


def test_a_server_that_refuses_for_ever_is_not_asked_for_ever(ask):
    with pytest.raises(RequestRefused) as caught:
        ask(after((400, {}, b'{"error": {"param": "temperature"}}')))
    assert len(caught.value.server.posts) == TRIES


def test_a_server_that_hangs_is_asked_twice(ask):
    """It takes the connection and the request, and answers neither time; how soon it is seen to hang plays no part."""
    hung = threading.Event()
    with Server(lambda number, body: hung.wait(HANG_SECONDS) or completion("too late")) as server:
        endpoint = Endpoint(server.url, "judge", backoff_seconds=0.01, timeout_seconds=0.2)
        with closing(endpoint), pytest.raises(UserError, match="in 2 tries .no answer in time, ReadTimeout"):
            endpoint.ask(BODY)
        wait_until(lambda: len(server.posts) == 2)
        hung.set()


def test_a_server_that_is_not_there_is_told_of_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    endpoint = Endpoint(url, "judge", backoff_seconds=60)
    for call in (endpoint.check, lambda: endpoint.ask(BODY)):
        with pytest.raises(UserError, match=f"no judge can be reached at {url}"):
            call()
    endpoint.close()


def test_a_server_that_was_there_and_goes_is_waited_for():
    told = []
    with Server(after(completion("x"))) as server:
        endpoint = Endpoint(server.url, "judge", backoff_seconds=0.01, tell=told.append)
        endpoint.ask(BODY)
        port = int(server.url.split(":")[2].removesuffix("/v1"))
    endpoint.close()
    endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", "judge", backoff_seconds=0.01, tell=told.append)
    endpoint._reached = True
    with pytest.raises(UserError, match=f"gave no answer in {TRIES} tries .ConnectError"):
        endpoint.ask(BODY)
    assert len(told) == TRIES - 1
    endpoint.close()


def test_the_key_is_checked_before_the_work():
    with Server(after(completion("x"))) as server:
        endpoint = Endpoint(server.url, "judge", "secret")
        endpoint.check()
        for status in (401, 403):
            server.models_status = status
            with pytest.raises(UserError, match="does not accept the key"):
                endpoint.check()
        server.models_status = 404  # many servers have no list
        endpoint.check()
        endpoint.close()


def test_the_budget_is_never_exceeded_with_retries_and_threads():
    with Server(lambda number, body: completion("x") if number % 2 else (500, {}, b"")) as server:
        endpoint = Endpoint(server.url, "judge", backoff_seconds=0.01, budget=5)
        with ThreadPoolExecutor(8) as pool:
            outcomes = [pool.submit(endpoint.ask, BODY).exception for _ in range(8)]
            failures = [outcome() for outcome in outcomes]
        endpoint.close()
    assert len(server.posts) == endpoint.num_sent == 5
    assert {type(failure) for failure in failures} == {type(None), BudgetSpent}


def test_requests_per_minute():
    with Server(after(completion("x"))) as server:
        endpoint = Endpoint(server.url, "judge", requests_per_minute=300)
        began = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(endpoint.ask, [BODY] * 6))
        assert time.monotonic() - began >= 5 * 0.2  # the first goes at once
        endpoint.close()


def test_who_waits_to_send_is_let_go():
    endpoint = Endpoint("http://127.0.0.1:9/v1", "judge")
    endpoint._pace.pause(3600)
    threading.Timer(0.1, endpoint.stop).start()
    with pytest.raises(BudgetSpent):
        endpoint.ask(BODY)
    endpoint.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "is not an http address"),
        ("ftp://host/v1", "is not an http address"),
        ("http://", "is not an http address"),
        ("", "is not an http address"),
        ("http://host:port/v1", "is not an address"),
        ("http://[::1/v1", "is not an address"),
        ("https://me:secret@host/v1", "put the key into an environment variable"),
        ("https://host/v1?key=1", "put the key into an environment variable"),
    ],
)
def test_addresses_that_cannot_be(url, message):
    with pytest.raises(UserError, match=message) as caught:
        check_url(url)
    assert "secret" not in str(caught.value)


def test_addresses():
    assert check_url(" http://localhost:8000/v1/ ") == "http://localhost:8000/v1"
    assert check_url("https://host/v1/chat/completions") == "https://host/v1"


@pytest.mark.parametrize("key", ["sk-1\n", "sk 1", "schlüssel", "\x00"])
def test_keys_that_cannot_be_are_not_told(key):
    with pytest.raises(UserError) as caught:
        check_key(key)
    assert key not in str(caught.value)
