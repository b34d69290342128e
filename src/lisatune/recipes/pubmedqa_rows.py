"""PubMedQA's labelled questions as rows to train on, without those of its test set.

python -m lisatune.recipes.pubmedqa_rows ori_pqal.json test_ground_truth.json pubmedqa.jsonl
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any


def read(path: Path) -> Any:
    """JSON, gzip or not."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return json.load(file)


def main(questions: str, test: str, output: str) -> None:
    """Write a row for each question that is not in ``test``: abstract and question, and yes, no or maybe."""
    held_out = read(Path(test)).keys()
    rows = []
    for number, item in read(Path(questions)).items():
        if number not in held_out:
            abstract = "\n".join(item["CONTEXTS"])
            prompt = f"Abstract: {abstract}\nQuestion: {item['QUESTION']}\nAnswer:"
            rows.append({"prompt": prompt, "completion": item["final_decision"]})
    Path(output).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{output}: {len(rows)} rows; {len(held_out)} test questions were left out")


if __name__ == "__main__":
    main(*sys.argv[1:])
