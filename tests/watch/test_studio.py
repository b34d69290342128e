"""``lisatune studio``: what its server does, and what it refuses."""

import json
import subprocess

import pytest
import yaml

from lisatune import UserError
from lisatune.settings import build_config
from lisatune.studio.places import Places
from patience import wait_until
from serving import get
from typed import typed

FORM = {"model": "models/tiny", "data": "rows.jsonl", "max_steps": "4", "max_length": "64", "learning_rate": "1e-2"}


def post(server, deed, asked=None, **headers):
    headers = {"X_Lisatune_Token": server.token, "Cookie": f"{server.cookie}={server.token}"} | headers
    answer = get(server, f"/studio/{deed}", method="POST", body=json.dumps(asked or {}), **headers)
    return answer.status, json.loads(answer.body) if answer.headers[
        "Content-Type"
    ] == "application/json" else answer.body


def asked(**settings):
    return {"name": "new", "settings": FORM | settings}


# --- what it does


def test_the_form_is_a_config_file_and_a_command(server):
    status, told = post(server, "check", asked(method="lora", eval_rows=" ", samples="['Hi: you', Ho]"))
    assert status == 200
    assert told["command"] == "lisatune train --config runs/new.yaml"
    config = build_config(yaml.safe_load(told["config"]))
    assert (config.method, config.learning_rate, config.output, config.samples) == (
        "lora",
        0.01,
        "runs/new",
        ["Hi: you", "Ho"],
    )
    status, told = post(server, "check", asked(learning_rate="fast"))
    assert status == 422
    assert told["error"].startswith("learning_rate='fast': input should be a valid number")


def test_it_offers_all_settings_and_what_there_is(server, home):
    (home / "more" / "deep").mkdir(parents=True)
    (home / "more" / "deep" / "chats.csv").write_text("")
    (home / "more" / "model.gguf").write_text("")
    _, told = post(server, "options")
    assert told["models"] == ["models/tiny", "more/model.gguf", "runs/done/model"]
    assert told["data"] == ["rows.jsonl", "more/deep/chats.csv"]
    names = [one["name"] for one in told["settings"]]
    assert {"model", "method", "learning_rate", "gradient_checkpointing"} <= set(names)
    assert not {"output", "trust_remote_code"} & set(names)
    assert "lisa" in next(one["choices"] for one in told["settings"] if one["name"] == "method")


def test_the_plan_follows_the_settings(server):
    _, told = post(server, "plan", asked(per_device_train_batch_size="16") | {"device": "cpu"})
    plan = told["plan"]
    assert (plan["rows"], plan["tokens"]) == (16, 64)
    assert sum(plan["bytes_of"].values()) == plan["peak_bytes"]
    status, told = post(server, "plan", {"name": "new", "settings": {}})
    assert (status, told["error"]) == (422, "model is missing: choose one in the first tab")


@pytest.mark.slow
def test_settings_that_fit_are_found(server):
    large = asked(per_device_train_batch_size="16") | {"device": "cpu"}
    plan = post(server, "plan", large)[1]["plan"]
    _, told = post(server, "plan", large | {"memory": f"{plan['peak_bytes'] // 2048}KiB"})
    assert told["plan"] == plan
    assert told["fitted"]["peak_bytes"] <= told["budget"] < plan["peak_bytes"]
    assert "=" in told["levers"]


def test_what_breaks_is_told_and_the_server_goes_on(server, studio, monkeypatch, capfd):
    def breaks(asked):
        raise MemoryError("no memory for this model")

    monkeypatch.setitem(server.posts, "/studio/chat", breaks)
    assert post(server, "chat") == (500, b"MemoryError: no memory for this model")
    assert "Traceback" in capfd.readouterr().err
    assert post(server, "state")[0] == 200


def test_the_end_of_a_long_log_is_shown(server, home):
    (home / "runs" / "done.log").write_text("a line\n" * 10**6 + "the last one\n")
    (run,) = post(server, "state")[1]["runs"]
    assert run["log"].endswith("a line\nthe last one\n")
    assert len(run["log"]) < 5000


def test_base_and_trained_model_answer(server):
    turns = [{"role": "user", "content": "What is 1 plus 1?"}]
    answers = [
        post(server, "chat", {"run": "done", "base": base, "messages": turns, "max_new_tokens": 8})
        for base in (True, False)
    ]
    assert [status for status, _ in answers] == [200, 200]
    assert answers[0][1]["answer"] != answers[1][1]["answer"]
    assert post(server, "chat", {"run": "done", "messages": []}) == (
        422,
        {"error": "ask something: the last message should be yours"},
    )


@pytest.fixture
def words(monkeypatch, studio):
    """What processes would be started with, where starting them is not what is tested."""
    begun = []

    class Process:
        def __init__(self, command, **options):
            begun.append(command[3:])

        def poll(self):
            return None

    monkeypatch.setattr(subprocess, "Popen", Process)
    return begun


def test_a_run_is_begun_with_the_file_that_was_shown(server, home, words):
    shown = post(server, "check", asked())[1]
    assert post(server, "train", asked())[0] == 200
    assert words == [["train", "--config", "runs/new.yaml"]]
    assert (home / "runs" / "new.yaml").read_text() == shown["config"]
    status, told = post(server, "train", asked())
    assert status == 422
    assert "runs/new exists already" in told["error"]
    assert post(server, "train", asked() | {"name": "done"})[0] == 422
    assert post(server, "resume", {"run": "new"})[1]["error"].startswith("runs/new trains already")
    assert post(server, "stop", {"run": "done"})[1]["error"].startswith(
        "runs/done is not training, or was not started here"
    )
    assert {one["name"]: one["state"] for one in post(server, "state")[1]["runs"]} == {
        "done": "finished",
        "new": "trains",
    }


@pytest.mark.slow
def test_a_run_is_begun_stopped_and_resumed(server, studio, home):
    def state():
        return {one["name"]: one["state"] for one in post(server, "state")[1]["runs"]}["new"]

    assert post(server, "train", asked(max_steps="1000000", lr_scheduler_type="constant"))[0] == 200
    metrics = home / "runs" / "new" / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and metrics.read_text().count("\n") > 3)
    assert state() == "trains"
    assert post(server, "stop", {"run": "new"}) == (200, {})
    wait_until(lambda: state() == "stopped")
    steps = metrics.read_text().count("\n")
    assert post(server, "resume", {"run": "new"})[0] == 200
    wait_until(lambda: metrics.read_text().count("\n") > steps + 3)
    studio.stop({"run": "new"})
    studio._jobs["new"].wait()
    _, told = post(server, "export", {"run": "done", "form": "bfloat16", "name": "mine"})
    assert told["command"] == "lisatune export runs/done exports/mine --dtype bfloat16"
    assert (home / "exports" / "mine" / "model.safetensors").is_file()
    _, told = post(server, "rows", asked())
    assert ["It is 0.</s>", True] in told["rows"][0]["pieces"]
    _, told = post(server, "rows", asked(data="gone.jsonl"))
    assert "gone.jsonl" in told["error"]


# --- who may


def test_nothing_is_told_without_the_token(server):
    for path in ("/", "/news", "/studio.js", "/studio/options"):
        assert get(server, path).status == 401
    assert get(server, f"/?token={server.token}").status == 200
    assert server.token in server.url


@pytest.mark.parametrize("deed", ["check", "train", "options", "state", "nothing"])
def test_a_site_of_others_cannot_send_what_counts(server, home, deed):
    """It has the browser's cookie, but not the token for the header; and its browser asks before it sends such a header."""
    for headers in (
        {"X_Lisatune_Token": ""},
        {"X_Lisatune_Token": server.token[:-1]},
        {"X_Other": server.token, "X_Lisatune_Token": "x"},
    ):
        assert post(server, deed, asked(), **headers)[0] == 403
    assert post(server, deed, asked(), Cookie="")[0] == 401
    assert post(server, deed, asked(), Host="evil.example")[0] == 421
    assert get(server, f"/studio/{deed}", method="OPTIONS", Origin="http://evil.example").status == 501
    assert get(server, f"/studio/{deed}?token={server.token}").status == 404  # what changes something is no address
    assert not (home / "runs" / "new.yaml").exists()


@pytest.mark.parametrize("body", ["", "[]", "5", "{", "null", "[" * 9999], ids=range(6))
def test_what_is_no_object_is_refused(server, body):
    headers = {"X_Lisatune_Token": server.token, "Cookie": f"{server.cookie}={server.token}"}
    assert get(server, "/studio/check", method="POST", body=body, **headers).status == 400
    for length in ("9" * 20, "-1", "x", str(2**21)):
        assert get(server, "/studio/check", method="POST", Content_Length=length, **headers).status == 400


# --- no path outside, no code of others


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data", "../outside.jsonl"), ("data", "/etc/hostname"), ("data", "~/rows.jsonl"), ("data", "link.jsonl"), ("data", "linked/rows.jsonl"),
        ("data", "[{path: ../outside.jsonl, share: 1}]"), ("eval_data", "{a: /etc/hostname}"), ("model", "/"), ("model", "~root"),
        ("dataset_prepared_path", "/tmp"), ("sampler_options", "{weights: ../outside.jsonl}"), ("eval_data_dir", ".."), ("chat_template", "../outside.jsonl"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("deed", ["check", "plan", "rows", "train"])
def test_no_setting_leads_out(server, home, deed, name, value):
    (home.parent / "outside.jsonl").write_text('{"text": "my secret"}\n')
    (home / "link.jsonl").symlink_to(home.parent / "outside.jsonl")
    (home / "linked").symlink_to(home.parent)
    status, told = post(server, deed, asked(**{name: value}))
    assert status == 422
    assert "is outside of the folders that this studio may use" in told["error"]


@pytest.mark.parametrize(("name", "value"), [("trust_remote_code", "true"), ("sampler", "os:system")])
def test_code_of_others_is_not_run(server, name, value):
    status, told = post(server, "check", asked(**{name: value}))
    assert status == 422
    assert told["error"].startswith("the studio does not run code ")
    assert f"leave {name} out" in told["error"]


@pytest.mark.parametrize(
    "name",
    ["../new", "a/b", "", ".", "..", ".hidden", "a\nb", "/tmp/x", "x" * 65, "-rf", None, 7, ["x"], "a\0"],
    ids=ascii,
)
def test_no_name_leads_out(server, home, name):
    before = sorted(home.parent.rglob("*"))
    for deed in ("check", "train", "plan", "rows"):
        assert post(server, deed, asked() | {"name": name})[0] == 422
    for deed in ("stop", "resume", "chat", "export"):
        assert post(server, deed, {"run": name, "form": "folder", "name": "x"})[0] == 422
    assert post(server, "export", {"run": "done", "form": "folder", "name": name})[0] == 422
    assert sorted(home.parent.rglob("*")) == before


def test_a_run_that_is_a_link_or_names_a_model_elsewhere_is_left_alone(server, home):
    (home / "runs" / "done").rename(home.parent / "theirs")
    (home / "runs" / "done").symlink_to(home.parent / "theirs")
    for deed in ("resume", "chat", "export"):
        assert post(server, deed, {"run": "done", "form": "folder", "name": "x"}) == (
            422,
            {"error": "there is no run 'done': choose one of the list"},
        )
    (home / "runs" / "done").unlink()
    (home.parent / "theirs").rename(home / "runs" / "done")
    config = home / "runs" / "done" / "config.yaml"
    config.write_text(config.read_text().replace("models/tiny", str(home.parent / "x")))
    for deed in ("resume", "chat"):
        assert (
            "is outside"
            in post(server, deed, {"run": "done", "messages": [{"role": "user", "content": "Hi"}]})[1]["error"]
        )


def test_several_folders_may_be_used(home, tmp_path):
    other = tmp_path / "data"
    other.mkdir()
    (other / "more.jsonl").write_text("")
    places = Places([home, other])
    places.check({"data": str(other / "more.jsonl")})
    assert str(other / "more.jsonl") in places.found()["data"]
    with pytest.raises(UserError, match="no such folder"):
        Places([home / "gone"])


def test_a_missing_folder_is_refused_by_the_command(tmp_path):
    done = typed("studio", tmp_path / "gone")
    assert done.returncode == 2
    assert "gone: no such folder; make it, or name another one" in done.stderr
