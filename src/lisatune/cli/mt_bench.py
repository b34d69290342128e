"""`lisatune mt-bench`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lisatune.cli.common import AnswerTokens, AnyDevice, AsJson, TrustRemoteCode, console, quiet_libraries
from lisatune.common.console import tell
from lisatune.errors import NEEDS_MATPLOTLIB, UserError

DEFAULT_KEY_NAME = "OPENAI_API_KEY"

Models = Annotated[
    list[str],
    typer.Argument(metavar="MODEL_OR_RUN [MODEL_OR_RUN]...", help="Folders of runs or models, or hub names."),
]
Questions = Annotated[
    str, typer.Option(help="File or hub name of the questions, in the form of FastChat's question.jsonl.")
]
References = Annotated[str | None, typer.Option(help="File of reference answers, in FastChat's form.")]
Output = Annotated[Path, typer.Option(help="Folder of answers, verdicts and results; the same one goes on.")]
JudgeUrl = Annotated[
    str, typer.Option(envvar="OPENAI_BASE_URL", help="OpenAI-compatible endpoint, such as http://localhost:8000/v1.")
]
JudgeModel = Annotated[str, typer.Option(envvar="LISATUNE_JUDGE_MODEL", help="The judge's name there.")]
KeyName = Annotated[str, typer.Option(help="Environment variable that holds the API key.")]
VerdictTokens = Annotated[
    int, typer.Option(min=1, help="Tokens of a verdict at most; a judge that thinks first needs more.")
]
Budget = Annotated[int | None, typer.Option(min=0, help="Requests to the judge at most, in this call.")]
Pace = Annotated[int | None, typer.Option(min=1, help="To the judge, at most.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Questions answered together.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Questions at most, from the categories by turns.")]


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
