"""The whole of MT-Bench in order: questions, answers of every model, verdicts, scores, and the files that hold them."""

from __future__ import annotations

import json
import platform
import signal
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lisatune.common.bars import counting_bar
from lisatune.common.files import write_whole
from lisatune.common.run_folder import only_run
from lisatune.errors import Stopped, UserError
from lisatune.evaluation.mt_bench.endpoint import Endpoint
from lisatune.evaluation.mt_bench.judge import Judge
from lisatune.evaluation.mt_bench.questions import NUM_TURNS, Question, read_questions
from lisatune.evaluation.mt_bench.records import Records
from lisatune.evaluation.mt_bench.scores import categories_of, notes_of, score
from lisatune.evaluation.mt_bench.verdicts import judge_prompt
from lisatune.models.names import check_model_name, model_of

if TYPE_CHECKING:
    from lisatune.evaluation.mt_bench.answers import Answers

ANSWERS, REPLIES, RESULT, RADAR = "answers.jsonl", "replies.jsonl", "mt_bench.json", "radar.svg"


def evaluate(
    models: Sequence[str],
    questions: str,
    endpoint: Endpoint,
    output: Path,
    *,
    references: str | None = None,
    limit: int | None = None,
    max_new_tokens: int = 1024,
    judge_max_tokens: int = 1024,
    batch_size: int = 8,
    device: str = "auto",
    trust_remote_code: bool = False,
    console: Console,
) -> dict[str, Any]:
    """Answer the questions with each of ``models``, have the answers judged, and write ``mt_bench.json``.

    In ``output`` answers and the judge's replies are kept line by line as they come (``answers.jsonl``, ``replies.jsonl``);
    the same call goes on where another stopped, and makes and asks for nothing twice.

    Args:
        models: Folders of runs or of models, ``.gguf`` files or hub names; answered one after another.
        questions: See ``read_questions``; so are ``references`` and ``limit``.
        endpoint: The judge; it is not asked before every answer is there, but looked up before the first is made.
        output: Folder; made if need be.
        max_new_tokens: See ``Answerer``; so are ``batch_size`` and ``device``.
        judge_max_tokens: See ``Judge``.
    Returns: What ``mt_bench.json`` holds.
    Raises: UserError; Stopped at Ctrl-C. What was made until then is kept.
    """
    # what can be found wrong before the first answer
    names = names_of(models)
    for model in models:
        check_model_name(model_of(model))
    asked = read_questions(questions, references, limit=limit)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output {output} cannot be made ({error.strerror}): choose another folder") from error

    # answers and verdicts, each kept as soon as it is there
    with only_run(output, doing="works"):
        judge = Judge(endpoint, Records(output / REPLIES), max_tokens=judge_max_tokens)
        try:
            answers = _answer(
                models, names, asked, endpoint, Records(output / ANSWERS), console,
                max_new_tokens=max_new_tokens, batch_size=batch_size, device=device,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
            prompts = [
                judge_prompt(q, a.texts[:turn])
                for of_model in answers
                for q, a in zip(asked, of_model, strict=True)
                for turn in (1, 2)
            ]
            verdicts = _judge(judge, prompts, console)
        except KeyboardInterrupt:
            raise Stopped(
                "stopped; what is done is kept: run the same command again to resume", signal.SIGINT
            ) from None

        # what came of it
        pairs = [verdicts[i : i + NUM_TURNS] for i in range(0, len(verdicts), NUM_TURNS)]
        entries = []
        for number, (name, model, of_model) in enumerate(zip(names, models, answers, strict=True)):
            scores = score(asked, pairs[number * len(asked) : (number + 1) * len(asked)])
            entries.append({"name": name, "model": model, "num_cut": sum(a.num_cut for a in of_model), **scores})
        result = {
            "judge": {"url": endpoint.url, "model": endpoint.model},
            "questions": questions,
            "num_questions": len(asked),
            "num_with_reference": sum(bool(question.references) for question in asked),
            "categories": categories_of(asked),
            "max_new_tokens": max_new_tokens,
            "models": entries,
            "num_requests": endpoint.num_sent,
            "made_with": {
                "python": platform.python_version(),
                **{n: version(n) for n in ("lisatune", "torch", "transformers")},
            },
        }
        result["notes"] = notes_of(result)
        write_whole(output / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def draw(result: dict[str, Any], output: Path) -> Path | None:
    """Write ``radar.svg``; None if there are fewer categories than a polygon has corners. Needs matplotlib."""
    from lisatune.pages.radar import LEAST_CORNERS, radar

    if len(result["categories"]) < LEAST_CORNERS:
        return None
    scores = {
        entry["name"]: [entry["by_category"][category]["mean"] for category in result["categories"]]
        for entry in result["models"]
    }
    write_whole(output / RADAR, radar(result["categories"], scores))
    return output / RADAR


def names_of(models: Sequence[str]) -> list[str]:
    """Short names for the table: the last part of each path, or all of it where that is not enough.

    Raises: UserError if a model is named twice.
    Example:
        >>> names_of(["runs/lisa", "runs/lora/model", "org/base", "other/base"])
        ['lisa', 'lora', 'org/base', 'other/base']
    """
    twice = [model for model, count in Counter(models).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]} is named twice: name each model once")
    parts = [[part for part in Path(model).parts if part != "/"] or [model] for model in models]
    short = [path[-2] if path[-1] == "model" and len(path) > 1 else path[-1] for path in parts]
    return [name if short.count(name) == 1 else model for name, model in zip(short, models, strict=True)]


def _answer(
    models: Sequence[str],
    names: Sequence[str],
    questions: Sequence[Question],
    endpoint: Endpoint,
    records: Records,
    console: Console,
    **settings: Any,
) -> list[list[Answers]]:
    from lisatune.evaluation.mt_bench.answers import Answerer

    answers: list[list[Answers]] = []
    checked = False
    for model, name in zip(models, names, strict=True):
        answerer = Answerer(model, records, **settings)
        if not checked and answerer.num_missing(questions):
            endpoint.check()  # before hours of work
            checked = True
        with counting_bar(f"answers of {name}", NUM_TURNS * len(questions), console) as bar:
            answers.append(answerer.answers(questions, bar.advance))
    return answers


def _judge(judge: Judge, prompts: Sequence[str], console: Console) -> list[Any]:
    missing = len(judge.missing(prompts))
    with counting_bar("verdicts", missing, console) as bar:
        judge.endpoint.tell = bar.note
        return judge.verdicts(prompts, bar.advance)
