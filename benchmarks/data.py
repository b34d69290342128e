"""Rows a second and resident memory of encoding, against trl (and axolotl preprocess, where it is installed).

python benchmarks/data.py WORK [--rows 500000] [--model ../shared/models/stories15M/hf] [--shared ../shared]

Makes WORK/rows.jsonl of prompts and completions from the shared Alpaca and GSM8K sets, again and again with a number in
front until there are enough, so no row stands there twice. Each tool runs in a process of its own, one after the other,
with one process of work; its result is kept in WORK/<tool>.json, so a benchmark that was stopped goes on. What is measured:
from the file to encoded rows that can be trained on, the tool's imports not counted, and the peak of the process's resident
memory. The second row of lisatune is the same call again, which finds the encoded rows on the disk.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

from lisatune.data.formats import parse_row, read_rows

SETS = ("alpaca/alpaca.jsonl.gz", "gsm8k/train.jsonl.gz")
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def make_rows(path: Path, shared: Path, num_rows: int) -> None:
    """The rows, once."""
    examples = [parse_row(row) for name in SETS for row in read_rows(str(shared / "data" / name))]
    pairs = [(example.messages[0]["content"], example.messages[1]["content"]) for example in examples]
    new = path.with_suffix(".new")
    with new.open("w", encoding="utf-8") as file:
        written = 0
        for turn in count():
            for prompt, completion in pairs:
                file.write(json.dumps({"prompt": f"{turn}. {prompt}", "completion": completion}) + "\n")
                written += 1
                if written == num_rows:
                    new.replace(path)
                    return


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

    def encode() -> int:
        rows = Rows(data, find_source(data), RowParser())
        return len(encode_rows(rows, Encoder(tokenizer, 1024), work / "stores", num_proc=1))

    return encode


def trl(work: Path, model: str) -> Any:
    """Encode as ``SFTTrainer`` does when it is made, with a model of one small layer."""
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = tokenizer.eos_token
    tiny = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    options = SFTConfig(str(work / "trl"), max_length=1024, report_to=[], use_cpu=True, bf16=False)

    def encode() -> int:
        def chats() -> Any:
            for line in (work / "rows.jsonl").open(encoding="utf-8"):
                row = json.loads(line)
                yield {
                    "prompt": [{"role": "user", "content": row["prompt"]}],
                    "completion": [{"role": "assistant", "content": row["completion"]}],
                }

        rows = Dataset.from_generator(chats, cache_dir=str(work / "trl-cache"))
        return len(SFTTrainer(tiny, options, train_dataset=rows, processing_class=tokenizer).train_dataset)

    return encode


TOOLS = {"lisatune": lisatune, "lisatune, again": lisatune, "trl": trl}


def measure(tool: str, work: Path, model: str) -> dict[str, Any]:
    """One tool, in this process."""
    encode = TOOLS[tool](work, model)
    before = resource.getrusage(resource.RUSAGE_SELF)
    begun = time.perf_counter()
    num_rows = encode()
    seconds = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "tool": tool, "rows": num_rows, "seconds": seconds, "rows_per_second": num_rows / seconds,
        "cpu_seconds": after.ru_utime - before.ru_utime, "peak_mib": after.ru_maxrss / 1024, "before_mib": before.ru_maxrss / 1024,
    }  # fmt: skip


def main() -> None:
    """Make the rows, measure what is not measured yet, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--rows", type=int, default=500_000)
    shared = Path(__file__).resolve().parents[2] / "shared"
    parser.add_argument("--shared", type=Path, default=shared)
    parser.add_argument("--model", default=None)
    parser.add_argument("--tool", choices=list(TOOLS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    model = given.model or str(given.shared / "models" / "stories15M" / "hf")
    if given.tool:
        print(json.dumps(measure(given.tool, given.work, model)))
        return
    given.work.mkdir(parents=True, exist_ok=True)
    if not (given.work / "rows.jsonl").is_file():
        make_rows(given.work / "rows.jsonl", given.shared, given.rows)
    print("| tool | rows | rows/s | CPU s | peak MiB | of it before |\n| --- | --- | --- | --- | --- | --- |")
    for tool in TOOLS:
        kept = given.work / f"{tool.replace(', ', '-')}.json"
        if not kept.is_file():
            words = [
                sys.executable,
                __file__,
                str(given.work),
                "--shared",
                str(given.shared),
                "--model",
                model,
                "--tool",
                tool,
            ]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            kept.write_text(done.stdout.strip().splitlines()[-1])
        found = json.loads(kept.read_text())
        print(
            f"| {tool} | {found['rows']:,} | {found['rows_per_second']:,.0f} | {found['cpu_seconds']:.0f} | "
            f"{found['peak_mib']:,.0f} | {found['before_mib']:,.0f} |", flush=True,
        )  # fmt: skip
    if importlib.util.find_spec("axolotl") is None:
        print("axolotl is not installed here: not measured")


if __name__ == "__main__":
    main()
