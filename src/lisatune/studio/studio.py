"""What the studio does: each deed is a command of the command line, or a function that such a command calls."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any

import yaml

from lisatune.common.amounts import parse_bytes
from lisatune.common.files import write_whole
from lisatune.errors import UserError, shown
from lisatune.settings import TrainConfig, build_config, parse_settings, read_settings
from lisatune.settings.listing import help_of, listed, spelled
from lisatune.studio.places import Places
from lisatune.watch.files import read_end, read_text
from lisatune.watch.runs import MOST_CONFIG_BYTES, SUMMARY, Runs

MOST_LOG_BYTES = 4000  # the last bytes of a run's output
ROWS_SHOWN = 12
FORMS = {"folder": [], "bfloat16": ["--dtype", "bfloat16"], "delta": ["--delta"]}  # forms of an export
GGUF_TYPES = ("f16", "bf16", "q8_0")


class Studio:
    """The runs of a folder, and what can be done with them.

    Args:
        places: The folders that may be used.
    """

    def __init__(self, places: Places) -> None:
        self.places, self.home = places, places.home
        self.runs = Runs([self.home / "runs"])
        self._jobs: dict[str, subprocess.Popen[bytes]] = {}
        self._models: dict[str, tuple[Any, Any]] = {}
        self._busy = Lock()  # torch: one plan, or one answer, at a time

    def posts(self) -> dict[str, Callable[[dict[str, Any]], Any]]:
        """What the page may ask for, by its path."""
        deeds = (
            self.options,
            self.check,
            self.rows,
            self.plan,
            self.train,
            self.stop,
            self.resume,
            self.state,
            self.chat,
            self.export,
        )
        return {f"/studio/{deed.__name__}": deed for deed in deeds}

    # -- a run's settings

    def options(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """All settings in their groups, and what there is to choose from."""
        schema = TrainConfig.model_json_schema()["properties"]
        settings = [
            {
                "group": one["group"], "name": one["name"], "help": help_of(one), "values": one["values"],
                "default": "" if one["default"] == "(required)" else spelled(one["default"]), "choices": schema[one["name"]].get("enum", []),
            }
            for one in listed() if one["name"] not in ("output", "trust_remote_code")
        ]  # fmt: skip
        return {"settings": settings, "forms": [*FORMS, *GGUF_TYPES], **self.places.found()}

    def check(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The config file that the form stands for, and the command.

        Raises: UserError for what ``lisatune train`` would refuse.
        """
        name, settings = self._read(asked)
        build_config(settings)
        return {
            "config": _as_yaml(settings),
            "command": shlex.join(["lisatune", "train", "--config", f"runs/{name}.yaml"]),
        }

    def rows(self, asked: Mapping[str, Any]) -> Any:
        """What ``lisatune data`` tells of the rows."""
        _, settings = self._read(asked)
        words = [
            f"{name}={json.dumps(value)}" for name, value in settings.items() if name not in ("data", "model", "output")
        ]
        data = settings.get("data", "")
        given = data if isinstance(data, str) else json.dumps(data)
        done = self._lisatune(
            ["data", f"--model={settings.get('model', '')}", f"--rows={ROWS_SHOWN}", "--json", "--", given, *words]
        )
        return json.loads(done)

    def plan(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The forecast of memory; with ``memory`` also the settings that make the run fit."""
        _, settings = self._read(asked)
        settings.pop("device", None)
        if "model" not in settings:
            raise UserError("model is missing: choose one in the first tab")
        memory = parse_bytes(str(asked["memory"])) if asked.get("memory") else None
        from lisatune.plan.ladder import forecast, pulled

        with self._busy:
            found = forecast(settings, [settings.pop("method", "lisa")], str(asked.get("device", "cuda")), memory)
        last = found.rungs[-1].plan if found.rungs else found.plans[0]
        return {
            "plan": found.plans[0].as_dict() | {"settings": {}}, "budget": found.budget, "reach": found.reach,
            "fitted": last.as_dict() | {"settings": {}}, "levers": pulled(found.rungs[0], found.rungs[-1]) if found.rungs else "",
        }  # fmt: skip

    def _read(self, asked: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Name and settings of the form: texts, as one types them after ``key=``."""
        name, form = self.places.name(asked.get("name")), asked.get("settings")
        given = (
            {n: v.strip() for n, v in form.items() if isinstance(v, str) and v.strip()}
            if isinstance(form, dict)
            else {}
        )
        settings = read_settings(None, [f"{n}={v}" for n, v in given.items()])
        settings |= {n: given[n] for n in ("model",) if n in given} | {"output": f"runs/{name}"}
        self.places.check(settings)
        return name, settings

    # -- the run

    def train(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Write the config file, and begin the run in a process of its own."""
        name, settings = self._read(asked)
        build_config(settings)
        path = self.home / "runs" / f"{name}.yaml"
        if path.exists() or path.with_suffix("").exists():
            raise UserError(f"runs/{name} exists already, and nothing is overwritten: choose another name")
        path.parent.mkdir(exist_ok=True)
        write_whole(path, _as_yaml(settings))
        return self._begin(name, ["train", "--config", f"runs/{name}.yaml"])

    def resume(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Go on with a run that was stopped."""
        name = self._run(asked)
        if self._trains(name):
            raise UserError(f"runs/{name} trains already: wait, or stop it first")
        self.places.check(self._config_of(name))
        return self._begin(name, ["train", "--config", f"runs/{name}/config.yaml", "--resume"])

    def stop(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Make the run save a checkpoint and end."""
        name = self._run(asked)
        if not self._trains(name):
            raise UserError(f"runs/{name} is not training, or was not started here: stop it where it was started")
        self._jobs[name].send_signal(signal.SIGTERM)
        return {}

    def state(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """For each run: whether it trains, has ended or can be resumed, and its last line of output."""
        there = {name: (self.home / "runs" / name / SUMMARY).is_file() for name in self._there()}
        told = {name: "finished" if finished else "stopped" for name, finished in there.items()}
        told |= {name: "failed" for name, job in self._jobs.items() if job.poll() not in (None, 0) and name not in told}
        told |= {name: "trains" for name in self._jobs if self._trains(name)}
        return {"runs": [{"name": name, "state": state, "log": self._log(name)} for name, state in told.items()]}

    def _begin(self, name: str, words: Sequence[str]) -> dict[str, Any]:
        with (self.home / "runs" / f"{name}.log").open("ab") as log:
            # a session of its own: the run outlives the studio, and Ctrl-C there is not for it
            self._jobs[name] = subprocess.Popen(
                _command(words), cwd=self.home, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=_environment(),
            )  # fmt: skip
        return {"name": name, "command": shlex.join(["lisatune", *words])}

    def _trains(self, name: str) -> bool:
        return name in self._jobs and self._jobs[name].poll() is None

    def _run(self, asked: Mapping[str, Any]) -> str:
        name = asked.get("run")
        if not isinstance(name, str) or name not in [*self._jobs, *self._there()]:
            raise UserError(f"there is no run {shown(name)}: choose one of the list")
        return name

    def _there(self) -> list[str]:
        """Names of the runs that have a folder; not those of comparisons."""
        return [run.folder.name for run in self.runs.all() if run.folder.parent == self.home / "runs"]

    def _config_of(self, name: str) -> dict[str, Any]:
        text = read_text(self.home / "runs" / name / "config.yaml", MOST_CONFIG_BYTES)
        return parse_settings(text or "", f"runs/{name}/config.yaml")

    def _log(self, name: str) -> str:
        return read_end(self.home / "runs" / f"{name}.log", MOST_LOG_BYTES)

    # -- the trained model

    def chat(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """An answer of the trained model, or with ``base`` of the one that the run began with.

        ``messages`` are the turns so far, the last one a question.
        """
        name, messages = self._run(asked), _messages(asked.get("messages"))
        config = self._config_of(name)
        self.places.check(config)
        source = str(config.get("model")) if asked.get("base") else str(self.home / "runs" / name)
        with self._busy:
            from lisatune.models.chat import Chat
            from lisatune.models.load import load_trained, pick_device

            if source not in self._models:
                if len(self._models) >= 2:
                    self._models.clear()
                model, tokenizer = load_trained(source)
                self._models[source] = (model.to(pick_device("auto")), tokenizer)
            partner = Chat(*self._models[source], max_new_tokens=min(int(asked.get("max_new_tokens", 128)), 1024))
            partner.messages = messages[:-1]
            return {"answer": partner.ask(messages[-1]["content"])}

    def export(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Write the trained model in one of the forms, and say what the command said."""
        name, form = self._run(asked), asked.get("form")
        if form not in (*FORMS, *GGUF_TYPES):
            raise UserError(f"form={shown(form)}: choose one of {', '.join([*FORMS, *GGUF_TYPES])}")
        output = self.places.name(asked.get("name"))
        options = FORMS[form] if form in FORMS else ["--gguf", str(form)]
        (self.home / "exports").mkdir(exist_ok=True)
        words = ["export", f"runs/{name}", f"exports/{output}", *options]
        return {"command": shlex.join(["lisatune", *words]), "told": json.loads(self._lisatune([*words, "--json"]))}

    def _lisatune(self, words: Sequence[str]) -> str:
        """What the command prints.

        Raises: UserError with the sentence that it ended with.
        """
        done = subprocess.run(
            _command(words), cwd=self.home, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=_environment()
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [
                f"it ended with status {done.returncode}"
            ]
            raise UserError(lines[-1].removeprefix("lisatune: "))
        return done.stdout


def _command(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "lisatune", *words]


def _environment() -> dict[str, str]:
    return os.environ | {"NO_COLOR": "1", "COLUMNS": "120", "PYTHONUNBUFFERED": "1"}


def _as_yaml(settings: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)


def _messages(value: Any) -> list[dict[str, str]]:
    turns = value if isinstance(value, list) else []
    found = [
        {"role": str(one.get("role")), "content": str(one.get("content"))} for one in turns if isinstance(one, dict)
    ]
    if not found or any(one["role"] not in ("user", "assistant") for one in found) or found[-1]["role"] != "user":
        raise UserError("ask something: the last message should be yours")
    return found
