"""A few rows of each task, in files as published, for where the real ones are not at hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

SENTENCES = [
    ("The cup fell off the table because _ was loose.", "the handle", "the floor", "1"),
    ("Ann thanked Eve, since _ had helped her.", "Ann", "Eve", "2"),
    ("The dog ran after the cat until _ was tired.", "the dog", "the cat", "1"),
    ("He put the ball in the box because _ was small.", "the ball", "the box", "1"),
    ("The sun dried the road before _ was swept.", "the sun", "the road", "2"),
    ("Tom lent Sam a coat, as _ was cold.", "Tom", "Sam", "2"),
    ("The nail bent on the wood because _ was hard.", "the nail", "the wood", "2"),
    ("We kept the milk and not the bread, as _ was fresh.", "the milk", "the bread", "1"),
]
SUBJECTS = {"anatomy": 5, "virology": 3}  # questions of each in the test


def write_tasks(folder: Path) -> Path:
    """Write the five data sets below ``folder``, and return it."""
    sums = [
        {"question": f"What is {i} plus 40?", "answer": f"It is <<{i}+40={i + 40}>>.\n#### {i + 40}"} for i in range(8)
    ]
    _lines(folder / "gsm8k/train.jsonl.gz", sums)
    _lines(folder / "gsm8k/test.even.jsonl.gz", sums[2:5])
    names = ("sentence", "option1", "option2", "answer")
    sentences = [dict(zip(names, row, strict=True)) for row in SENTENCES]
    _lines(folder / "winogrande/train_m.jsonl", sentences)
    _lines(folder / "winogrande/dev.jsonl", sentences)
    for split in ("dev", "val", "test"):
        rows = [
            {
                "subject": subject,
                "question": f"Which is {i} of {subject}?",
                "choices": list("wxyz"),
                "answer": "ABCD"[i % 4],
            }
            for subject, count in SUBJECTS.items()
            for i in range(count)
        ]
        _lines(folder / f"mmlu/{split}.jsonl.gz", rows)
    questions = {
        str(i): {
            "QUESTION": f"Does {i} help?",
            "CONTEXTS": ["We tried.", "It did."],
            "final_decision": ["yes", "no", "maybe"][i % 3],
        }
        for i in range(6)
    }
    (folder / "pubmedqa").mkdir()
    (folder / "pubmedqa/ori_pqal.json").write_text(json.dumps(questions))
    (folder / "pubmedqa/test_ground_truth.json").write_text(json.dumps({"4": "no", "1": "no"}))
    for part, passage in (("sat-en", "A cat sat. "), ("aqua-rat", None)):
        row = {"passage": passage, "question": "Who sat?", "options": ["(A)cat", "(B)dog", "(C)hen"], "label": "A"}
        _lines(folder / f"agieval/{part}.jsonl", [row])
    return folder


def _lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
