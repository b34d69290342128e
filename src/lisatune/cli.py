"""The command line: parse, call one function, print. Heavy imports are inside the commands that need them."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lisatune.errors import Stopped, UserError
from lisatune.launch import command, num_started, number_started, without_nproc

app = typer.Typer(
    help="Fine-tune every weight of a language model on the memory of an adapter (LISA, arXiv:2403.17919).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True, quiet=number_started() > 0)  # of several processes one speaks

DEFAULT_KEY_NAME = "OPENAI_API_KEY"
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command(epilog="All settings with their defaults: lisatune settings")
def train(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, which win over the file's.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="YAML file of settings.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder, .gguf file or hub name of the model.")] = None,
    data: Annotated[str | None, typer.Option(help="File, folder or hub name of the rows to learn.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the run.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the output folder, if there is one.")
    ] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="With --resume: although settings or data have changed.")
    ] = False,
    save_every: Annotated[
        str | None,
        typer.Option(metavar="N steps|minutes", help="How often to write a checkpoint; 10 minutes by default."),
    ] = None,
    keep: Annotated[int | None, typer.Option(metavar="N", help="How many checkpoints to keep.")] = None,
    log_to: Annotated[str | None, typer.Option(help="tensorboard, wandb or trackio.")] = None,
    fit: Annotated[
        str | None, typer.Option(metavar="MEMORY", help="Pull the levers that make the run fit, for example 24GiB.")
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Processes (GPUs) of this host; for several hosts use torchrun."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model with LISA, LoRA or all parameters."""
    from lisatune.amounts import parse_bytes
    from lisatune.config import build_config, read_settings
    from lisatune.preflight import preflight

    settings = read_settings(config, overrides or [])
    named: dict[str, Any] = {"model": model, "data": data, "output": output, "log_to": log_to}
    named["save_total_limit"] = keep
    named |= {} if save_every is None else parse_period(save_every)
    checked = build_config(settings | {name: value for name, value in named.items() if value is not None})
    memory_bytes = None if fit is None else parse_bytes(fit)
    if memory_bytes is not None and (nproc or num_started()) > 1:
        raise UserError("--fit works on one process alone: leave it out, or start one")
    if allow_changes and not resume:
        raise UserError("--allow-changes has no effect without --resume: add it, or leave this out")
    resume = resume or offer_to_go_on(Path(checked.output))
    if nproc is not None and num_started() == 1:
        words = command(nproc, without_nproc(sys.argv[1:]))
        os.execv(words[0], words)
    # several processes have to meet before one of them may give up
    examples = preflight(checked, resume=resume) if num_started() == 1 else None
    quiet_libraries()
    from lisatune.train import train as train_run

    summary = train_run(
        checked,
        console=console,
        resume=resume,
        allow_changes=allow_changes,
        memory_bytes=memory_bytes,
        examples=examples,
    )
    if number_started() > 0:
        return
    if as_json:
        print(json.dumps(summary))
    else:
        print_summary(summary, checked.output)


@app.command(epilog="All settings with their defaults: lisatune settings")
def plan(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the run, as for train.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="YAML file of settings.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder, config.json or hub name of the model.")] = None,
    method: Annotated[
        str, typer.Option(help="Methods to put side by side; with --gpu-memory levers are pulled for the first.")
    ] = "lisa,lora,full",
    gpu_memory: Annotated[str | None, typer.Option(help="Find what fits into it, for example 24GiB.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    nproc: Annotated[
        int, typer.Option(min=1, metavar="N", help="Processes (GPUs) that train together, of all hosts.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Predict the peak memory of a run, without weights and without a GPU, and find what fits."""
    from lisatune.amounts import parse_bytes
    from lisatune.config import read_settings

    settings = read_settings(config, overrides or [])
    named = {"model": model} if model is not None else {}
    settings |= named
    settings.pop("device", None)
    memory_bytes = None if gpu_memory is None else parse_bytes(gpu_memory)
    methods = [settings.pop("method")] if "method" in settings else [m.strip() for m in method.split(",")]
    if settings.get("model") is None:
        raise UserError("model is missing: give --model, a Hugging Face folder, a config.json or a hub name")
    quiet_libraries()
    from lisatune.fit import forecast

    with console.status("planning"):
        result = forecast(settings, methods, device, memory_bytes, nproc)
    if as_json:
        print(json.dumps(result.as_dict()))
        return
    from lisatune.analysis.plan_table import show_plans, show_rungs

    out = Console()
    out.print(show_plans(result.plans, result.budget))
    if result.budget is not None:
        out.print(show_rungs(result.rungs, result.budget, result.reach))


@app.command(epilog="All settings with their defaults: lisatune settings")
def compare(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE,...]...",
            help="Settings, each with a value or several: method=lisa,lora seed=0,1 learning_rate=1e-4,1e-3 "
            "lora.learning_rate=1e-3,3e-3",
        ),
    ] = None,
    config: Annotated[str | None, typer.Option(help="YAML file of settings; a list holds several values.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder, .gguf file or hub name of the model.")] = None,
    data: Annotated[str | None, typer.Option(help="File, folder or hub name of the rows to learn.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the comparison; one that is there goes on.")] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="MEMORY", help="Peak within which the best is looked for, for example 24GiB.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run again what has failed.")] = False,
    drop_models: Annotated[
        bool, typer.Option("--drop-models", help="Keep the numbers of finished runs, not their weights.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run methods and settings side by side, each at its own best learning rate, over seeds."""
    from lisatune.amounts import parse_bytes
    from lisatune.analysis.comparison_table import show
    from lisatune.compare import compare as compare_all
    from lisatune.grid import read_grid

    given = read_grid(config, overrides or [])
    given |= {name: value for name, value in {"model": model, "data": data}.items() if value is not None}
    folder = output or given.pop("output", None)
    if not isinstance(folder, str):
        raise UserError("output is missing: give --output, the folder of the comparison")
    memory_bytes = None if memory is None else parse_bytes(memory)
    result = compare_all(
        given, Path(folder), console=console, memory_bytes=memory_bytes, retry=retry, drop_models=drop_models
    )
    if as_json:
        print(json.dumps(result))
    else:
        Console().print(show(result))
        console.print(f"the page: {Path(folder) / 'report.html'}", highlight=False, soft_wrap=True)


@app.command()
def chat(
    run: Annotated[str, typer.Argument(help="A run's folder, a model's folder, or a hub name.")],
    prompt: Annotated[str | None, typer.Option(help="Answer this once, instead of talking.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token always.")] = 0.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, ... or auto.")] = "auto",
) -> None:
    """Speak with a trained model."""
    from lisatune.preflight import check_model_name

    inside = Path(run).expanduser() / "model"
    check_model_name(str(inside) if inside.is_dir() else run)
    quiet_libraries()
    from lisatune.chat import chat

    chat(run, prompt, system=system, max_new_tokens=max_new_tokens, temperature=temperature, device=device)


@app.command("eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="RUN|MODEL...", help="Folders of runs, models, hub names.")],
    tasks: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness, for example gsm8k,mmlu.")],
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with gsm8k/, mmlu/, ...: their data is read from there, not from the hub."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Documents of each task at most.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Examples before each question; the task's own by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts at a time.")] = 8,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Write prompts as chats, for a model that was taught chats.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, ... or auto.")] = "auto",
    output: Annotated[
        Path | None, typer.Option(help="Folder of scores.json; a run's own folder by default, for a model none.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score models on tasks; a run's model before and after training."""
    quiet_libraries()
    from lisatune.tasks.harness import find_tasks, task_names

    names = task_names(tasks)
    find_tasks(names, data_dir)
    from lisatune.tasks.before_after import find_target, score_targets

    targets = [find_target(model, output) for model in dict.fromkeys(models)]
    found = score_targets(
        targets, names, data_dir=data_dir, limit=limit, num_fewshot=num_fewshot, batch_size=batch_size,
        chat_template=apply_chat_template, device=device, console=console,
    )  # fmt: skip
    if as_json:
        print(json.dumps([scored.as_dict() for scored in found]))
        return
    from lisatune.analysis.score_table import show

    Console().print(show(found))


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run's folder, a delta's, a model's, or a .gguf file.")],
    output: Annotated[Path, typer.Argument(help="The new folder, or the new file with --gguf.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as it is stored by default.")] = None,
    delta: Annotated[
        bool,
        typer.Option("--delta", help="Only the weights that the run has changed; export makes a model of them again."),
    ] = False,
    gguf: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="For llama.cpp: f32, f16, bf16 or q8_0. Needs 'lisatune\\[export]'."),
    ] = None,
    push_to: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload the folder to this hub repository too.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hand on what was trained: a plain folder, only what changed, or a GGUF file."""
    from lisatune.amounts import gib
    from lisatune.preflight import check_export

    check_export(run, dtype=dtype, delta=delta, gguf=gguf, push_to=push_to)
    quiet_libraries()
    from lisatune.export import export_delta, export_gguf, export_model, push

    if delta:
        told = export_delta(run, output)
    elif gguf is not None:
        told = export_gguf(run, output, gguf)
    else:
        told = export_model(run, output, dtype)
    if push_to is not None:
        told["pushed"] = push(output, push_to)
    if as_json:
        print(json.dumps(told))
        return
    share = f", {told['tensors']} of {told['of']} tensors, of {gib(told['of_bytes'])}" if delta else ""
    console.print(f"{output}: {gib(told['bytes'])}{share}", highlight=False, soft_wrap=True)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Folder of a run or of a comparison.")]) -> None:
    """Write report.html of a finished run or of a comparison."""
    compared = (run / "comparison.json").is_file()
    if not compared and not (run / "summary.json").is_file():
        raise UserError(f"{run}: holds no finished run (no summary.json)")
    quiet_libraries()
    try:
        if compared:
            from lisatune.analysis.comparison import write_comparison as write
        else:
            from lisatune.analysis.report import write_report as write
    except ImportError as error:
        from lisatune.errors import missing_package

        raise missing_package("matplotlib", "the report", "report") from error
    print(write(run))


@app.command()
def norms(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN]...", help="Folders of runs with norm_steps.")],
    output: Annotated[
        Path | None, typer.Option(help="Page to write; norms.html in the first run's folder by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """How far each layer moved, of several runs side by side, and norms.html."""
    from lisatune.analysis.norms import read_norms, show, study, write_page

    found = [read_norms(run) for run in runs]
    told = study(found)
    if as_json:
        print(json.dumps(told))
        return
    Console().print(show(told))
    try:
        print(write_page(found, output or runs[0] / "norms.html"))
    except ImportError:
        console.print("no norms.html, which needs matplotlib: pip install 'lisatune[report]'", markup=False)


@app.command(name="mt-bench")
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
    from lisatune.mt_bench.endpoint import Endpoint
    from lisatune.mt_bench.evaluation import draw, evaluate
    from lisatune.mt_bench.scores import show

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


@app.command()
def settings(as_json: AsJson = False) -> None:
    """List all settings of a run with their defaults."""
    from lisatune.config import TrainConfig

    rows = []
    for name, field in TrainConfig.model_fields.items():
        default = "(required)" if field.is_required() else field.default
        rows.append({"name": name, "default": default, "description": field.description})
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("setting", "default", "what it does")
    for row in rows:
        table.add_row(str(row["name"]), "" if row["default"] is None else str(row["default"]), row["description"])
    Console().print(table)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder of the run; a fresh one is chosen by default.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Watch a real pretrained model learn about this tool, on a CPU, in a few minutes."""
    quiet_libraries()
    from lisatune.demo import run_demo

    run_demo(output, console=console)


def parse_period(text: str) -> dict[str, float]:
    """``100 steps`` or ``10 minutes`` as settings."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(steps?|minutes?)\s*", text)
    if match is None:
        raise UserError(f"--save-every '{text}' is not a period: write for example '100 steps' or '10 minutes'")
    return {"save_steps" if match[2].startswith("step") else "save_minutes": float(match[1])}


def offer_to_go_on(folder: Path) -> bool:
    """Ask whether to go on with a run that was stopped; only a person can be asked."""
    from lisatune.preflight import describe_run

    if num_started() > 1 or not sys.stdin.isatty():
        return False
    if not (folder / "config.yaml").is_file() or (folder / "summary.json").is_file():
        return False
    return typer.confirm(
        f"{folder} holds {describe_run(folder).partition(':')[0]}. Go on with it?", default=True, err=True
    )


def print_summary(summary: dict[str, Any], output: str) -> None:
    """The end of a run, for people."""
    from lisatune.amounts import gib
    from lisatune.losses import told

    table = Table(show_header=False)
    for label, text in told(summary):
        table.add_row(label, text)
    if summary.get("skipped_steps"):
        table.add_row("steps left out", f"{summary['skipped_steps']:,}, whose loss or gradient was bad")
    table.add_row("tokens", f"{summary['tokens']:,} in {summary['steps']:,} steps, {summary['train_seconds']:.0f} s")
    base, own = summary["base_bytes"], summary["peak_bytes"] - summary["base_bytes"]
    table.add_row(
        "memory",
        f"peak {gib(own)}, predicted {gib(summary['planned_peak_bytes'])}"
        + (f" (and {gib(base)} of the process beside it)" if base else "")
        + f", optimizer state {gib(summary['state_bytes'])}",
    )
    console.print(table)
    console.print(f"speak with it: lisatune chat {output}", highlight=False, soft_wrap=True)


def quiet_libraries() -> None:
    """Keep other libraries' bars and notes out of ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit status 2."""
    console = Console(stderr=True)
    name = "lisatune" if number_started() == 0 else f"lisatune (rank {number_started()})"
    try:
        if num_started() > 1 and sys.argv[1:2] != ["train"]:
            raise UserError("several processes can only train: start this command once, without torchrun")
        app()
    except UserError as error:
        console.print(f"{name}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except Stopped as stopped:
        if number_started() == 0:
            console.print(f"lisatune: {stopped}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        sys.exit(128 + stopped.signal)


if __name__ == "__main__":
    main()
