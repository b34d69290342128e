"""`lisatune mt-bench`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lisatune.cli.common import AsJson, console, quiet_libraries
from lisatune.errors import UserError

DEFAULT_KEY_NAME = "OPENAI_API_KEY"


def mt_bench(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL_OR_RUN [MODEL_OR_RUN]...", help="Folders of runs or models, or hub names."),
    ],
    questions: Annotated[
        str, typer.Option(help="File or hub name of the questions, in the form of FastChat's question.jsonl.")
    ],
    judge_url: Annotated[
        str,
        typer.Option(envvar="OPENAI_BASE_URL", help="OpenAI-compatible endpoint, such as http://localhost:8000/v1."),
    ],
    judge_model: Annotated[str, typer.Option(envvar="LISATUNE_JUDGE_MODEL", help="The judge's name there.")],
    judge_key_env: Annotated[str, typer.Option(help="Environment variable that holds the API key.")] = DEFAULT_KEY_NAME,
    references: Annotated[str | None, typer.Option(help="File of reference answers, in FastChat's form.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of answers, verdicts and results; the same one goes on.")] = Path(
        "runs/mt-bench"
    ),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 1024,
    judge_max_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a verdict at most; a judge that thinks first needs more.")
    ] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 8,
    budget: Annotated[int | None, typer.Option(min=0, help="Requests to the judge at most, in this call.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="To the judge, at most.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions at most, from the categories by turns.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ... or auto.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Answer two-turn questions, have a model judge the answers, and put models side by side (MT-Bench)."""
    from lisatune.evaluation.mt_bench.endpoint import Endpoint
    from lisatune.evaluation.mt_bench.evaluation import draw, evaluate
    from lisatune.evaluation.mt_bench.scores import show

    key = os.environ.get(judge_key_env)
    if key is None and judge_key_env != DEFAULT_KEY_NAME:
        raise UserError(
            f"--judge-key-env {judge_key_env}: no such environment variable is set; set it to the judge's API key"
        )
    endpoint = Endpoint(judge_url, judge_model, key, budget=budget, requests_per_minute=requests_per_minute)
    quiet_libraries()
    result = evaluate(
        models, questions, endpoint, output, references=references, limit=limit, max_new_tokens=max_new_tokens,
        judge_max_tokens=judge_max_tokens, batch_size=batch_size, device=device, console=console,
    )  # fmt: skip
    try:
        radar = draw(result, output) or "not drawn, which takes three categories or more"
    except ImportError:
        radar = "not drawn, which needs matplotlib: pip install 'lisatune[report]'"
    if as_json:
        print(json.dumps(result))
        return
    Console().print(show(result))
    console.print(
        f"all numbers: {output / 'mt_bench.json'}; radar: {radar}", markup=False, highlight=False, soft_wrap=True
    )
