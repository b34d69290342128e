"""The grid of a comparison: every run that its settings ask for. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, get_args, get_origin

from lisatune.compare.search import check_optuna, suggest
from lisatune.errors import UserError, did_you_mean
from lisatune.methods import METHODS
from lisatune.settings import ROWS, TrainConfig, build_config, plays, read_settings, used_settings, with_new_names

Settings = tuple[dict[str, Any], list[str]]  # the settings of a run, and the names of those with several values
LossOf = Callable[[str], float | None]
OPTUNA = "optuna"
PLURALS = {"methods": "method", "seeds": "seed"}
# what held-out losses and times can only be compared within
ONE_VALUE = tuple(name for name, row in ROWS.items() if row.one_value)
EVALUATIONS = 10  # points of a curve, where eval_steps is not given


@dataclass(frozen=True)
class Trial:
    """One run of the grid.

    Args:
        name: Name of its folder.
        contender: What it is a run of.
        varied: The settings that name the contender.
        searched: Values of the settings that are searched.
        config: All settings; ``config.seed`` is what contenders are averaged over.
    """

    name: str
    contender: str
    varied: dict[str, Any]
    searched: dict[str, Any]
    config: TrainConfig


@dataclass(frozen=True)
class Grid:
    """All runs of a comparison, in the order in which they run.

    Args:
        given: Setting to its values, or to one; a method's name to settings of its own.
        search: Settings that are tuned for each contender.
        trials: Seed by seed, and each seed contender by contender, so that a busy hour of the machine falls on all alike. Of a
            search by optuna, those whose values are known.
        planned: How many runs there will be.
    """

    given: dict[str, Any]
    search: tuple[str, ...]
    trials: tuple[Trial, ...]
    planned: int

    def contenders(self) -> list[str]:
        """Names, in the order given."""
        return list(dict.fromkeys(trial.contender for trial in self.trials))

    def of(self, contender: str) -> list[Trial]:
        """The runs of one contender."""
        return [trial for trial in self.trials if trial.contender == contender]


def read_grid(path: str | None, words: Sequence[str]) -> dict[str, Any]:
    """The grid of a YAML file, then that of ``key=value,value`` words, which win.

    A word ``lora.learning_rate=1e-3,3e-3`` is for one method, as ``lora: {learning_rate: [1e-3, 3e-3]}`` is in a file.

    Example:
        >>> read_grid(None, ["methods=lisa,full", "learning_rate=1e-4,3e-4", "lisa.num_active=2"])
        {'method': ['lisa', 'full'], 'learning_rate': [0.0001, 0.0003], 'lisa': {'num_active': 2}}
    """
    grid = {PLURALS.get(name, name): value for name, value in read_settings(path, []).items()}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.strip():
            raise UserError(f"'{word}' is not of the form key=value or key=value,value: learning_rate=1e-4,3e-4")
        name = name.strip()
        name, several = PLURALS.get(name, name), _split(text)
        if name in ("model", "data", "output", "eval_data"):
            several = [text]  # paths may hold commas
        values = [_read_value(one) for one in several]
        value = values if len(values) > 1 else values[0]
        method, dot, inner = name.partition(".")
        if not dot:
            grid[name] = value
        elif isinstance(settings := grid.setdefault(method, {}), dict):
            settings[inner] = value
    return grid


def _read_value(text: str) -> Any:
    """The value that a setting's word stands for; what stands in quotes is text."""
    if text.startswith('"'):
        with suppress(ValueError):
            return json.loads(text)
    return read_settings(None, [f"value={text}"])["value"]


def _split(text: str) -> list[str]:
    """At commas outside of brackets, braces and quotes.

    Example:
        >>> _split("[a, b],{c: 1, d: 2},e")
        ['[a, b]', '{c: 1, d: 2}', 'e']
    """
    parts, depth, quoted = [""], 0, False
    for letter in text:
        quoted ^= letter == '"'
        depth += 0 if quoted else (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def make_grid(
    given: Mapping[str, Any], output: Path, names: Mapping[str, str] | None = None, loss_of: LossOf = lambda name: None
) -> Grid:
    """Every run of the grid ``given``, its settings checked.

    Args:
        given: What ``read_grid`` returned.
        output: The comparison's folder.
        names: Identity of a run that is there to the name of its folder.
        loss_of: A run's name to its loss, infinite if it failed; None if it has not ended. A search by optuna asks it.
    Raises: UserError for a setting that cannot be, or if contenders would get different numbers of runs.
    Example:
        >>> grid = {"model": "m", "data": "d", "eval_rows": 9, "max_steps": 50, "method": ["lisa", "full"], "seed": [0, 1],
        ...         "num_active": [2, 4], "learning_rate": [1e-4, 3e-4]}
        >>> made = make_grid(grid, Path("cmp"))
        >>> made.contenders(), len(made.trials), made.trials[0].name
        (['lisa num_active=2', 'lisa num_active=4', 'full'], 12, 'lisa-num_active=2-learning_rate=0.0001-seed=0')
    """
    given = {
        name: with_new_names(value) if name in METHODS and isinstance(value, Mapping) else value
        for name, value in with_new_names(given).items()
        if name != "output"
    }

    # what is compared, what is searched, and what may hold several values
    search = tuple(_values("search", given.get("search", "learning_rate")))
    by_optuna = OPTUNA in search
    search = tuple(name for name in search if name != OPTUNA) or ("learning_rate",)
    if "trials" in given and not by_optuna:
        raise UserError("trials has no effect without search=optuna: add it, or leave trials out")
    num_trials = check_optuna(given.get("trials")) if by_optuna else 0
    methods = _values("method", given.get("method", "lisa"))
    for name in search:
        if name not in TrainConfig.model_fields or name in (*ONE_VALUE, "method", "seed"):
            raise UserError(
                f"search={name} is not a setting that can be searched{did_you_mean(name, TrainConfig.model_fields)}"
            )
    shared = {n: v for n, v in given.items() if n not in (*METHODS, "search", "method", "trials")}
    for method in METHODS:
        of_method = given.get(method, {})
        if method in given and (method not in methods or not isinstance(of_method, Mapping)):
            raise UserError(
                f"settings for {method} alone have no effect: write them as {method}.name=value, and add {method} to methods"
            )
        for name in of_method:
            if name in (*ONE_VALUE, "method", "seed", "search"):
                raise UserError(f"{method}.{name}: all methods must have the same {name}: write {name}=value")
    _check_names(shared, methods)

    # a trial for each combination, with a name of its own
    def made(settings: Settings) -> Trial:
        return _trial(settings, search, output, dict(names or {}))

    frames = [frame for method in methods for frame in _settings_of(str(method), shared, given.get(method, {}), search)]
    if by_optuna:
        trials, contenders = _searched(frames, search, num_trials, made, loss_of)
        return Grid(given, search, tuple(trials), num_trials * contenders)
    trials, taken = [], set[str]()
    for trial in map(made, frames):
        if trial.name.casefold() in taken:
            raise UserError(
                f"{trial.contender}: the run {trial.name} is in the grid twice: leave out the value that repeats"
            )
        taken.add(trial.name.casefold())
        trials.append(trial)

    # all contenders under the first seed, then under the next: a comparison that is cut short still compares
    order = list(dict.fromkeys(trial.config.seed for trial in trials))
    turn = {trial.name: i for i, trial in enumerate(_by_turns(trials))}
    trials.sort(key=lambda trial: (order.index(trial.config.seed), turn[trial.name]))
    counts = Counter(trial.contender for trial in trials)
    if len(set(counts.values())) > 1:
        numbers = ", ".join(f"{contender}: {count}" for contender, count in counts.items())
        raise UserError(
            f"methods would get different numbers of runs ({numbers}): give each the same number of values of {', '.join(search)}"
        )
    return Grid(given, search, tuple(trials), len(trials))


def _searched(
    frames: Sequence[Settings],
    search: Sequence[str],
    num_trials: int,
    made: Callable[[Settings], Trial],
    loss_of: LossOf,
) -> tuple[list[Trial], int]:
    """The runs whose searched values are known, contenders by turns, and how many runs a round of them has.

    Contenders take their trials in rounds: each gets values that its own earlier runs suggest, and runs them with every seed.
    A round begins when the one before has ended, so all contenders get equally many trials.
    """
    # contenders: their settings with each seed, and the range of each searched setting, from the combinations of the grid
    plain: dict[str, dict[int, Settings]] = {}
    spaces: dict[str, dict[str, list[Any]]] = {}
    for settings, several in frames:
        contender = made((settings, several)).contender
        plain.setdefault(contender, {}).setdefault(settings["seed"], (settings, several))
        space = spaces.setdefault(contender, {})
        for name in (name for name in search if name in settings):
            if settings[name] not in space.setdefault(name, []):
                space[name].append(settings[name])
    for contender, space in spaces.items():
        spaces[contender] = {name: values for name, values in space.items() if len(values) > 1}
        if not spaces[contender]:
            raise UserError(
                f"{contender}: search=optuna needs a range of {', '.join(search)}: give the least and the most, as in "
                "learning_rate=1e-5,1e-3"
            )

    # their trials, round by round
    tried: dict[str, list[tuple[dict[str, Any], float]]] = {contender: [] for contender in plain}
    trials: list[Trial] = []
    for _ in range(num_trials):
        a_round = []
        for contender, space in spaces.items():
            values = suggest(space, tried[contender], contender)
            runs = [made((settings | values, several)) for settings, several in plain[contender].values()]
            losses = [loss_of(run.name) for run in runs]
            tried[contender].append((values, fmean(math.inf if loss is None else loss for loss in losses)))
            a_round += list(zip(runs, losses, strict=True))
        trials += [run for run, _ in a_round]
        if any(loss is None for _, loss in a_round):
            break
    return trials, sum(map(len, plain.values()))


def _by_turns(trials: Sequence[Trial]) -> list[Trial]:
    """The first of each contender, then the second of each."""
    queues: dict[str, list[Trial]] = {}
    for trial in trials:
        queues.setdefault(trial.contender, []).append(trial)
    longest = max(map(len, queues.values()), default=0)
    return [queue[i] for i in range(longest) for queue in queues.values() if i < len(queue)]


def _check_names(shared: Mapping[str, Any], methods: Sequence[Any]) -> None:
    for name, value in shared.items():
        if name not in TrainConfig.model_fields:
            raise UserError(f"unknown setting '{name}'{did_you_mean(str(name), TrainConfig.model_fields)}")
        if name in ONE_VALUE and len(_values(name, value)) > 1:
            raise UserError(
                f"{name} has several values, and their losses cannot be compared: make one comparison for each value"
            )
        takers = ROWS[name].methods
        if takers and not set(takers) & set(methods):
            shown = ",".join(map(str, methods))
            raise UserError(f"{name} has no effect with method={shown}: leave it out, or add {' or '.join(takers)}")
    if not (shared.get("eval_data") or shared.get("eval_rows")):
        raise UserError("a comparison needs held-out rows: give eval_rows=<number> or eval_data=<file>")


def _settings_of(
    method: str, shared: Mapping[str, Any], of_method: Mapping[str, Any], search: Sequence[str]
) -> Iterator[Settings]:
    """Settings of each run of ``method``, and the names of those that hold several values."""
    idle = f"method={method}"
    played = {n: v for n, v in shared.items() if plays(n, method) and (n not in ROWS or idle not in ROWS[n].idle_with)}
    played |= dict(of_method)
    if "eval_steps" not in played and isinstance(played.get("max_steps"), int):
        played["eval_steps"] = max(1, played["max_steps"] // EVALUATIONS)
    played.setdefault("seed", 0)
    axes = {name: _values(name, value) for name, value in played.items()}
    several = [n for n, values in axes.items() if len(values) > 1 and n not in (*search, "seed")]
    for values in product(*axes.values()):
        yield {"method": method} | dict(zip(axes, values, strict=True)), several


def _values(name: str, value: Any) -> list[Any]:
    """The values of a grid's entry; a list is one value where the setting itself is a list, unless it holds lists."""
    if not isinstance(value, list):
        return [value]
    if name in TrainConfig.model_fields and not any(isinstance(one, list) for one in value):
        annotation = TrainConfig.model_fields[name].annotation
        if any(get_origin(kind) is list for kind in (annotation, *get_args(annotation))):
            return [value]
    if not value:
        raise UserError(f"{name} has no value: give at least one")
    return value


def _trial(settings_of: Settings, search: Sequence[str], output: Path, names: Mapping[str, str]) -> Trial:
    settings, several = settings_of
    config = build_config(settings | {"output": str(output)})
    varied = {name: getattr(config, name) for name in several}
    searched = {name: getattr(config, name) for name in search if name in settings}
    contender = " ".join([config.method, *(f"{name}={short_text(value)}" for name, value in varied.items())])
    words = [contender.replace(" ", "-"), *(f"{name}={short_text(value)}" for name, value in searched.items())]
    name = names.get(identity(config)) or _file_name("-".join([*words, f"seed={config.seed}"]))
    config = config.model_copy(update={"output": str(output / "runs" / name)})
    return Trial(name, contender, varied, searched, config)


def short_text(value: Any) -> str:
    """Numbers as short as they can be without becoming others."""
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else str(value)


def _file_name(text: str) -> str:
    """``text`` if any file system takes it; otherwise what is left of it, and a hash.

    Example:
        >>> _file_name("lisa-seed=0"), _file_name("lora-../x")
        ('lisa-seed=0', 'lora-..-x-ecc9ff')
    """
    kept = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_=.+") else "-" for letter in text)
    if kept == text and len(text) <= 120:
        return text
    return f"{kept[:110]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def identity(config: TrainConfig) -> str:
    """What a run is known by: every setting that plays a part in what comes of it."""
    settings = {name: value for name, value in used_settings(config).items() if not ROWS[name].free}
    return json.dumps(settings, sort_keys=True, default=str)


def command(given: Mapping[str, Any]) -> str:
    """What to type for the grid ``given``.

    Example:
        >>> command({"model": "m", "data": "d", "method": ["lisa", "full"], "seed": 0, "full": {"learning_rate": 1e-5}})
        'lisatune compare --model m --data d --output OUTPUT method=lisa,full seed=0 full.learning_rate=1e-05'
    """
    options = [word for name in ("model", "data") if name in given for word in (f"--{name}", str(given[name]))]
    words = []
    for name, value in given.items():
        inner = {f"{name}.{n}": v for n, v in value.items()} if name in METHODS else {name: value}
        words += [f"{n}={_word(n, v)}" for n, v in inner.items() if n not in ("model", "data", "output")]
    return shlex.join(["lisatune", "compare", *options, "--output", "OUTPUT", *words])


def _word(name: str, value: Any) -> str:
    def one(v: Any) -> str:
        plain = str(v)
        survives = _split(plain) == [plain] and _read_value(plain) == v
        return plain if survives and not isinstance(v, bool | list | dict) else json.dumps(v)

    values = _values(name.rpartition(".")[2], value)
    return ",".join(one(v) for v in values)
