"""`lisatune mt-bench`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lisatune.cli.common import (
    ANSWERS,
    OUTPUT,
    AnswerTokens,
    AnyDevice,
    AsJson,
    TrustRemoteCode,
    console,
    quiet_libraries,
)
from lisatune.common.console import tell
from lisatune.errors import NEEDS_MATPLOTLIB, UserError

DEFAULT_KEY_NAME = "OPENAI_API_KEY"
QUESTIONS, JUDGE = "Questions", "Judge"

Models = Annotated[
    list[str],
    typer.Argument(metavar="MODEL_OR_RUN [MODEL_OR_RUN]...", help="Folders of runs or models, or hub names."),
]
Questions = Annotated[
    str,
    typer.Option(
        help="File or hub name of the questions, in the form of FastChat's question.jsonl.", rich_help_panel=QUESTIONS
    ),
]
References = Annotated[
    str | None, typer.Option(help="File of reference answers, in FastChat's form.", rich_help_panel=QUESTIONS)
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Ask at most this many questions, spread over the categories.", rich_help_panel=QUESTIONS),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Questions answered together.", rich_help_panel=ANSWERS)]
JudgeUrl = Annotated[
    str,
    typer.Option(
        envvar="OPENAI_BASE_URL",
        help="OpenAI-compatible endpoint, such as http://localhost:8000/v1.",
        rich_help_panel=JUDGE,
    ),
]
JudgeModel = Annotated[
    str, typer.Option(envvar="LISATUNE_JUDGE_MODEL", help="The judge's name there.", rich_help_panel=JUDGE)
]
KeyName = Annotated[str, typer.Option(help="Environment variable that holds the API key.", rich_help_panel=JUDGE)]
VerdictTokens = Annotated[
    int,
    typer.Option(
        min=1, help="Longest verdict, in tokens. A judge that thinks first needs more.", rich_help_panel=JUDGE
    ),
]
Budget = Annotated[
    int | None, typer.Option(min=0, help="Most requests to the judge in this call.", rich_help_panel=JUDGE)
]
Pace = Annotated[int | None, typer.Option(min=1, help="Most requests to the judge in a minute.", rich_help_panel=JUDGE)]
Output = Annotated[
    Path,
    typer.Option(
        help="Folder of answers, verdicts and results. If it exists, the evaluation resumes.", rich_help_panel=OUTPUT
    ),
]


def mt_bench(
    models: Models,
    questions: Questions,
    judge_url: JudgeUrl,
    judge_model: JudgeModel,
    judge_key_env: KeyName = DEFAULT_KEY_NAME,
    references: References = None,
    output: Output = Path("runs/mt-bench"),
    max_new_tokens: AnswerTokens = 1024,
    judge_max_tokens: VerdictTokens = 1024,
    batch_size: BatchSize = 8,
    budget: Budget = None,
    requests_per_minute: Pace = None,
    limit: Limit = None,
    device: AnyDevice = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Have a judge model grade answers to two-turn questions (MT-Bench).

    Your models answer here. The judge is reached at an OpenAI-compatible address.

    Example:
        lisatune mt-bench runs/a --questions question.jsonl \\
            --judge-url http://localhost:8000/v1 --judge-model my-judge
    """
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
        judge_max_tokens=judge_max_tokens, batch_size=batch_size, device=device, trust_remote_code=trust_remote_code,
        console=console,
    )  # fmt: skip
    try:
        radar = draw(result, output) or "not drawn, which takes three categories or more"
    except ImportError:
        radar = f"not drawn, which {NEEDS_MATPLOTLIB}"
    if as_json:
        print(json.dumps(result))
        return
    Console().print(show(result))
    tell(console, f"all numbers: {output / 'mt_bench.json'}; radar: {radar}")
