"""The whole of it: real models that answer, a real model that judges behind a real socket, the command as it is typed."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import closing

import pytest
import torch
from rich.console import Console

from judge_server import Server, completion, speaks_with
from lisatune.data.tokenize import PLAIN_TEMPLATE
from lisatune.errors import Stopped, UserError
from lisatune.evaluation.mt_bench.endpoint import Endpoint
from lisatune.evaluation.mt_bench.evaluation import draw, evaluate, names_of
from patience import HANG_SECONDS, started, wait_until
from tiny import make_llama, make_tokenizer

CATEGORIES = ["writing", "maths", "coding"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two tiny random models, as folders."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(["first", "second"]):
        make_llama(layers=2, vocab_size=len(make_tokenizer()), max_position_embeddings=512, seed=seed).save_pretrained(
            folder / name
        )
        make_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"question_id": i, "category": CATEGORIES[i % 3], "turns": [f"What is {i}?", "Why?"]} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def run(models, questions, memory_path):
    def run(server, *names, key=None, budget=None, **settings):
        endpoint = Endpoint(server.url, "judge", key, budget=budget, backoff_seconds=0.01)
        try:
            return evaluate(
                [str(models / name) for name in names or ("first", "second")], questions, endpoint, memory_path / "out",
                max_new_tokens=6, batch_size=4, device="cpu", console=Console(quiet=True), **settings,
            )  # fmt: skip
        finally:
            endpoint.close()

    return run


@pytest.fixture(scope="module")
def judge():
    """A tiny model that has learned, in a second, to end every prompt with a grade of its own choice, and its tokenizer."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = PLAIN_TEMPLATE
    model = make_llama(layers=2, vocab_size=len(tokenizer))
    ask, grade = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("\n### Assistant:\n", "Grade: [[7]]")
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    end = [*ask, *grade, tokenizer.eos_token_id]
    for _ in range(80):
        words = torch.randint(3, len(tokenizer), (8, 160 - len(ask)))
        ids = torch.cat([words, torch.tensor(end).expand(8, -1)], dim=1)
        labels = torch.full_like(ids, -100)
        labels[:, -len(grade) - 1 :] = ids[:, -len(grade) - 1 :]
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def test_real_models_judged_by_a_real_model(run, judge, memory_path):
    with Server(speaks_with(*judge)) as server:
        result = run(server)
    assert [entry["name"] for entry in result["models"]] == ["first", "second"]
    assert result["categories"] == CATEGORIES
    for entry in result["models"]:
        assert (entry["num_verdicts"], entry["num_unparsable"], entry["mean"]) == (12, 0, 7.0)
        assert (entry["first_turn"], entry["second_turn"], entry["standard_error"]) == (7.0, 7.0, 0.0)
        assert {c: s["mean"] for c, s in entry["by_category"].items()} == dict.fromkeys(CATEGORIES, 7.0)
    assert json.loads((memory_path / "out" / "mt_bench.json").read_text()) == result
    pytest.importorskip("matplotlib")
    drawn = draw(result, memory_path / "out")
    assert all(word in drawn.read_text() for word in ("first", "second", *CATEGORIES))


def test_a_judge_that_knows_no_grade_is_counted(run, models):
    """An untrained model says nothing that can be parsed: no score comes of it, and the counts say why."""
    from lisatune.models.load import load_model

    model, tokenizer = load_model(str(models / "first"))
    tokenizer.chat_template = PLAIN_TEMPLATE
    with Server(speaks_with(model, tokenizer)) as server:
        result = run(server, "second", limit=3)
    [entry] = result["models"]
    assert (entry["mean"], entry["num_unparsable"], entry["num_verdicts"]) == (None, 6, 6)
    assert sum(entry["unparsable"].values()) == 6
    assert any("6 verdicts without a grade are left out" in note for note in result["notes"])


def test_each_model_is_given_the_verdicts_of_its_own_answers(run, memory_path):
    def behave(number, body):
        text = body["messages"][0]["content"]
        answers = [json.loads(line) for line in (memory_path / "out" / "answers.jsonl").read_text().splitlines()]
        graded = [a for a in answers if a["model"].endswith("first") and f"{a['answer']}\n=== END ASSISTANT" in text]
        return completion(f"[[{9 if graded else 2}]]" if "second answer" not in text else "[[4]]")

    with Server(behave) as server:
        result = run(server)
    assert [(e["name"], e["first_turn"], e["second_turn"], e["mean"]) for e in result["models"]] == [
        ("first", 9.0, 4.0, 6.5), ("second", 2.0, 4.0, 3.0)
    ]  # fmt: skip


def test_a_third_model_costs_no_more_than_its_own(run):
    with Server(lambda number, body: completion("[[5]]")) as server:
        run(server, "first")
        first = len(server.posts)
        result = run(server, "first", "second")
        again = run(server, "first", "second")
    prompts = [body["messages"][0]["content"] for body in server.posts]
    assert first == 12
    assert len(prompts) == len(set(prompts)) <= 24
    assert (result["num_requests"], again["num_requests"]) == (len(prompts) - 12, 0)


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_is_told_of_before_any_answer_is_made(run, memory_path, status):
    with Server(lambda number, body: completion("[[5]]")) as server:
        server.models_status = status
        with pytest.raises(UserError, match="does not accept the key"):
            run(server, key="wrong")
    assert not (memory_path / "out" / "answers.jsonl").exists()
    assert "wrong" not in "".join(p.read_text() for p in (memory_path / "out").iterdir())


@pytest.mark.parametrize(
    "nonsense",
    [(200, {}, b"<html>"), (200, {}, b"{}"), (500, {}, b""), (404, {}, b""), (429, {"Retry-After": "9999"}, b"")],
)
def test_an_endpoint_that_fails_loses_no_answer(run, memory_path, nonsense):
    with Server(lambda number, body: nonsense) as server, pytest.raises(UserError):
        run(server, "first")
    made = (memory_path / "out" / "answers.jsonl").read_bytes()
    assert made.count(b"\n") == 12
    with Server(lambda number, body: completion("[[5]]")) as server:
        assert run(server, "first")["models"][0]["mean"] == 5.0
    assert (memory_path / "out" / "answers.jsonl").read_bytes() == made


@pytest.fixture
def interruptible():
    """SIGINT interrupts, which it does not where the tests were started in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_keeps_what_there_is(run, memory_path, monkeypatch, interruptible):
    noticed, stop = threading.Event(), Endpoint.stop
    monkeypatch.setattr(Endpoint, "stop", lambda endpoint: (stop(endpoint), noticed.set()))

    def behave(number, body):
        if number == 6:
            os.kill(os.getpid(), signal.SIGINT)
        if number >= 6:
            noticed.wait(HANG_SECONDS)  # else all may be answered before
        return completion("[[5]]")

    with Server(behave) as server:
        with pytest.raises(Stopped, match="run the same command again"):
            run(server, "first")
        assert 6 <= len(server.posts) < 12
        assert run(server, "first")["models"][0]["num_verdicts"] == 12
        assert len(server.posts) == 12


def command(server, models, questions, output, *words, **environment):
    words = ["mt-bench", str(models / "first"), "--questions", questions, "--output", str(output), *map(str, words)]
    words += ["--max-new-tokens", "6", "--device", "cpu"]
    place = (
        {"OPENAI_BASE_URL": server.url, "LISATUNE_JUDGE_MODEL": "judge", "OPENAI_API_KEY": "secret"} if server else {}
    )
    return started(
        [sys.executable, "-m", "lisatune", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"} | place | environment,
    )  # fmt: skip


def test_killed_in_the_middle_it_goes_on_and_asks_for_nothing_twice(models, questions, memory_path):
    """With -9, while the server still thinks about some: those alone may be asked again."""
    answered = []

    def behave(number, body):
        if number > 5 and not going_on:
            server.let_go.wait(HANG_SECONDS)
        answered.append(body["messages"][0]["content"])
        return completion("So: [[8]]")

    going_on = []
    output = memory_path / "out"
    replies = output / "replies.jsonl"
    with Server(behave) as server:
        with command(server, models, questions, output) as killed:
            wait_until(lambda: replies.exists() and replies.read_bytes().count(b"\n") >= 5, killed)
            killed.kill()
            killed.communicate()
        done = [json.loads(line) for line in replies.read_text().splitlines()]
        assert (killed.returncode, len(done)) == (-signal.SIGKILL, 5)
        with replies.open("a") as file:
            file.write('{"key": "torn')
        first, made = set(answered), (output / "answers.jsonl").read_text()
        going_on.append(True)
        before = len(server.posts)
        with command(server, models, questions, output, "--json") as again:
            told, errors = again.communicate(timeout=HANG_SECONDS)
        assert again.returncode == 0, errors
        asked = [body["messages"][0]["content"] for body in server.posts[before:]]
        server.let_go.set()
    assert len(asked) == len(set(asked)) == 12 - 5
    assert not first & set(asked)
    assert (output / "answers.jsonl").read_text() == made
    assert json.loads(told)["models"][0]["mean"] == 8.0
    assert server.headers[-1]["Authorization"] == "Bearer secret"
    assert "secret" not in told + errors + "".join(p.read_text() for p in output.iterdir())
    assert (output / "radar.svg").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--questions", "nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
        (["--judge-url", "localhost:1"], "--judge-url localhost:1 is not an http address"),
        (["--judge-key-env", "NO_SUCH_KEY"], "--judge-key-env NO_SUCH_KEY: no such environment variable is set"),
        (["./no-model"], "./no-model: no such model folder or file"),
        (["--output", "file/out"], "cannot be made"),
    ],
)
def test_mistakes_are_one_sentence_without_waiting_for_torch(models, questions, tmp_path, monkeypatch, words, message):
    from typer.testing import CliRunner

    from lisatune.cli.app import app

    monkeypatch.setitem(sys.modules, "lisatune.evaluation.mt_bench.answers", None)  # what imports torch
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    given = ["mt-bench", str(models / "first"), "--questions", questions, "--judge-url", "http://localhost:1/v1"]
    done = CliRunner().invoke(app, [*given, "--judge-model", "j", "--output", str(tmp_path / "out"), *words])
    assert isinstance(done.exception, UserError)
    assert message in str(done.exception)


def test_an_unreachable_judge_is_told_of_before_any_answer_is_made(run, memory_path):
    with Server(lambda number, body: completion("")) as server:
        pass
    with pytest.raises(UserError, match="no judge can be reached"):
        run(server)
    assert not (memory_path / "out" / "answers.jsonl").exists()


def test_two_at_once_in_one_folder(run, memory_path):
    from lisatune.common.run_folder import only_run

    (memory_path / "out").mkdir()
    refused = pytest.raises(UserError, match="another process works in")
    with Server(lambda number, body: completion("[[5]]")) as server, only_run(memory_path / "out"), refused:
        run(server)


def test_too_few_categories_for_a_radar(tmp_path):
    pytest.importorskip("matplotlib")
    assert draw({"categories": ["a", "b"], "models": []}, tmp_path) is None


def test_names():
    assert names_of(["./base", "runs/a/model/"]) == ["base", "a"]
    with pytest.raises(UserError, match="x is named twice"):
        names_of(["x", "y", "x"])


@pytest.mark.slow
def test_the_server_of_transformers(models, questions, tmp_path):
    """As a user starts it; it takes half a minute to be there."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason="pip install 'transformers[serving]' is needed to serve a model")
    judge = tmp_path / "judge"
    make_llama(layers=1, vocab_size=len(make_tokenizer()), max_position_embeddings=8192).save_pretrained(judge)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = PLAIN_TEMPLATE
    tokenizer.save_pretrained(judge)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "transformers.cli.transformers", "serve", "--device", "cpu", "--port", str(port)]
    log = (tmp_path / "log").open("w+")
    endpoint = Endpoint(f"http://localhost:{port}/v1", str(judge))
    with log, closing(endpoint), started([sys.executable, *words], stdout=log, stderr=log) as server:
        wait_until(lambda: "Uvicorn running" in (tmp_path / "log").read_text(), server)
        result = evaluate(
            [str(models / "first")], questions, endpoint, tmp_path / "out", max_new_tokens=6, judge_max_tokens=20,
            device="cpu", console=Console(quiet=True),
        )  # fmt: skip
    [entry] = result["models"]
    assert (entry["num_verdicts"], result["num_requests"]) == (12, 12)
    assert (entry["num_unparsable"], entry["mean"]) == (12, None)  # a random model
    replies = [json.loads(line) for line in (tmp_path / "out" / "replies.jsonl").read_text().splitlines()]
    assert all(reply["usage"]["completion_tokens"] <= 20 for reply in replies)
