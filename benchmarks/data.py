"""Rows a second and resident memory of encoding, against trl and axolotl preprocess.

python benchmarks/data.py WORK [--rows 500000] [--model ../shared/models/stories15M/hf] [--shared ../shared]
                               [--axolotl PYTHON] [--page]

Makes WORK/rows.jsonl of prompts and completions from the shared Alpaca and GSM8K sets, again and again with a number in
front until there are enough, so no row stands there twice. WORK/chats.jsonl has the same rows as messages, for axolotl.
Each tool runs in a process of its own, by turns, with one process of work; its result is kept in WORK/<tool>-<round>.json, so
a benchmark that was stopped goes on. The faster of two rounds counts. What is measured: from the file to encoded rows that can be
trained on, the tool's imports not counted, and the peak of the process's resident memory. "lisatune, again" is the same
call again, which finds the encoded rows on the disk. All tools use the same tokenizer and the same template, learn the answer
alone, and cut at 1,024 tokens; so their numbers of tokens are compared too. axolotl needs other versions than trl, so it
has an environment of its own, whose interpreter is PYTHON: python -m venv /tmp/axolotl; /tmp/axolotl/bin/pip install axolotl.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from itertools import count, islice
from pathlib import Path
from typing import Any

import yaml
from results import SHARED, markdown, write_page

SETS = ("alpaca/alpaca.jsonl.gz", "gsm8k/train.jsonl.gz")
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


MAX_LENGTH = 1024


def make_rows(work: Path, shared: Path, num_rows: int) -> None:
    """The rows, once."""
    from lisatune.data.formats import parse_row, read_rows

    examples = [parse_row(row) for name in SETS for row in read_rows(str(shared / "data" / name))]
    pairs = [(example.messages[0]["content"], example.messages[1]["content"]) for example in examples]
    numbered = ((f"{turn}. {prompt}", completion) for turn in count() for prompt, completion in pairs)
    with (
        (work / "rows.new").open("w", encoding="utf-8") as rows,
        (work / "chats.jsonl").open("w", encoding="utf-8") as chats,
    ):
        for prompt, completion in islice(numbered, num_rows):
            question, answer = {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}
            rows.write(json.dumps({"prompt": [question], "completion": [answer]}) + "\n")
            chats.write(json.dumps({"messages": [question, answer]}) + "\n")
    (work / "rows.new").replace(work / "rows.jsonl")


def lisatune(work: Path, model: str) -> Any:
    """Encode as ``lisatune train`` does with large data; returns what is to be timed."""
    from lisatune.data.examples import Rows
    from lisatune.data.files import find_source
    from lisatune.data.formats import RowParser
    from lisatune.data.store import encode_rows
    from lisatune.data.tokenize import Encoder
    from lisatune.models.load import load_tokenizer

    tokenizer, _ = load_tokenizer(model)
    tokenizer.chat_template = TEMPLATE
    data = str(work / "rows.jsonl")

    def encode() -> tuple[int, int]:
        rows = Rows(data, find_source(data), RowParser())
        store = encode_rows(rows, Encoder(tokenizer, MAX_LENGTH), work / "stores", num_proc=1)
        return len(store), int(store.lengths().sum())

    return encode


def trl(work: Path, model: str) -> Any:
    """Encode as ``SFTTrainer`` does when it is made, with a model of one small layer."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = tokenizer.eos_token
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tiny = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    options = SFTConfig(str(work / "trl"), max_length=MAX_LENGTH, report_to=[], use_cpu=True, bf16=False)

    def encode() -> tuple[int, int]:
        rows = load_dataset(
            "json", data_files=str(work / "rows.jsonl"), split="train", cache_dir=str(work / "trl-cache")
        )
        encoded = SFTTrainer(tiny, options, train_dataset=rows, processing_class=tokenizer).train_dataset
        return encoded_size(encoded)

    return encode


def axolotl(work: Path, model: str) -> Any:
    """Encode as ``axolotl preprocess`` does."""
    os.environ.update(AXOLOTL_IS_PREPROCESS="1", AXOLOTL_DO_NOT_TRACK="1", HF_HUB_OFFLINE="1")
    from axolotl.cli.args import PreprocessCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.preprocess import do_preprocess
    from datasets import load_from_disk

    config = {
        "base_model": model, "chat_template": "jinja", "chat_template_jinja": TEMPLATE, "sequence_len": MAX_LENGTH,
        "datasets": [{"path": str(work / "chats.jsonl"), "ds_type": "json", "type": "chat_template", "field_messages": "messages"}],
        "dataset_prepared_path": str(work / "axolotl"), "dataset_num_proc": 1, "output_dir": str(work / "axolotl-out"),
        "micro_batch_size": 1, "gradient_accumulation_steps": 1, "num_epochs": 1, "learning_rate": 1e-4, "optimizer": "adamw_torch",
        "special_tokens": {"pad_token": "</s>"}, "bf16": False, "train_on_inputs": False, "val_set_size": 0,
    }  # fmt: skip
    (work / "axolotl.yml").write_text(yaml.safe_dump(config))
    loaded = load_cfg(str(work / "axolotl.yml"), is_preprocess=True)
    loaded.is_preprocess = True

    def encode() -> tuple[int, int]:
        do_preprocess(loaded, PreprocessCliArgs())
        return encoded_size(load_from_disk(str(next((work / "axolotl").glob("*/state.json")).parent)))

    return encode


def encoded_size(rows: Any) -> tuple[int, int]:
    """Rows and tokens of a data set of ``datasets``, without taking it into memory."""
    lists = (chunk for chunk in rows.data.column("input_ids").chunks)
    return len(rows), sum(len(chunk.flatten()) for chunk in lists)


TOOLS = {"lisatune": lisatune, "lisatune, again": lisatune, "trl": trl, "axolotl": axolotl}
PACKAGES = ("lisatune", "trl", "axolotl", "transformers", "tokenizers", "datasets")


def measure(tool: str, work: Path, model: str) -> dict[str, Any]:
    """One tool, in this process."""
    encode = TOOLS[tool](work, model)
    before = resource.getrusage(resource.RUSAGE_SELF)
    begun = time.perf_counter()
    num_rows, num_tokens = encode()
    seconds = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "tool": tool, "rows": num_rows, "tokens": num_tokens, "seconds": seconds, "rows_per_second": num_rows / seconds,
        "cpu_seconds": after.ru_utime - before.ru_utime + children.ru_utime, "before_mib": before.ru_maxrss / 1024,
        "peak_mib": max(after.ru_maxrss, children.ru_maxrss) / 1024, "load": os.getloadavg()[0],
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run(tool: str, turn: int, given: argparse.Namespace, model: str) -> dict[str, Any]:
    """One tool in a process of its own; what was measured before is kept."""
    kept: Path = given.work / f"{tool.replace(', ', '-')}-{turn}.json"
    if not kept.is_file():
        for folder in FOLDERS.get(tool, ()):
            shutil.rmtree(given.work / folder, ignore_errors=True)
        python = given.axolotl if tool == "axolotl" else sys.executable
        words = [python, __file__, str(given.work), "--model", model, "--tool", tool]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{tool} ended with status {done.returncode}")
        kept.write_text(done.stdout.strip().splitlines()[-1])
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


ABOUT = (
    "From the file to encoded rows that can be trained on; imports not counted. One process of work each, one tool after the "
    "other, in two rounds; the faster counts. Other work ran on the machine, so rows/s tell less than CPU seconds do. The last "
    "column is the machine's load when the tool ended, on 2 cores."
)
FOLDERS = {"lisatune": ["stores"], "trl": ["trl", "trl-cache"], "axolotl": ["axolotl"]}  # what is encoded anew
COLUMNS = ["tool", "rows", "tokens", "seconds", "rows/s", "CPU s", "peak MiB", "of it before", "other load"]


def as_cells(found: dict[str, Any]) -> list[str]:
    """A line of the table."""
    return [
        found["tool"], f"{found['rows']:,}", f"{found['tokens']:,}", f"{found['seconds']:,.1f}", f"{found['rows_per_second']:,.0f}",
        f"{found['cpu_seconds']:,.0f}", f"{found['peak_mib']:,.0f}", f"{found['before_mib']:,.0f}", f"{found['load']:.1f}",
    ]  # fmt: skip


def main() -> None:
    """Make the rows, measure what is not measured yet, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--model", default=None)
    parser.add_argument(
        "--rounds", type=int, default=2, help="How often each tool has its turn; the faster one counts."
    )
    parser.add_argument("--axolotl", metavar="PYTHON", help="Interpreter of an environment that has axolotl.")
    parser.add_argument("--page", action="store_true", help="Write the page under results/.")
    parser.add_argument("--tool", choices=list(TOOLS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    model = given.model or str(given.shared / "models" / "stories15M" / "hf")
    if given.tool:
        print(json.dumps(measure(given.tool, given.work, model)))
        return
    given.work.mkdir(parents=True, exist_ok=True)
    if not (given.work / "rows.jsonl").is_file():
        make_rows(given.work, given.shared, given.rows)
    tools = [tool for tool in TOOLS if tool != "axolotl" or given.axolotl]
    rounds = [[run(tool, turn, given, model) for tool in tools] for turn in range(1, given.rounds + 1)]
    found = [min(turns, key=lambda one: one["seconds"]) for turns in zip(*rounds, strict=True)]
    table = markdown(COLUMNS, map(as_cells, found))
    print(table)
    if given.page:
        versions = "\n".join(
            f"- {one['tool']}: {', '.join(f'{k} {v}' for k, v in one['versions'].items())}" for one in found
        )
        print(
            write_page(
                "data", f"{table}\n\n{ABOUT}\n\n{versions}", "How fast rows are encoded, and in how much memory."
            )
        )


if __name__ == "__main__":
    main()
