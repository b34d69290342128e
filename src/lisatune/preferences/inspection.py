"""What a run of a task of TRL would see of its rows, before it starts."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import Any

import torch
import transformers
from rich.console import Console

from lisatune.assemble import make_task
from lisatune.data.examples import HeldOut, Rows, spread
from lisatune.data.inspection import Inspection, PaddingShares, ShownRow, padding, shown_row, special_texts
from lisatune.data.read import count_rows
from lisatune.data.tokenize import IGNORED, Counts, Encoded
from lisatune.preferences.build import make_trainer, quiet_trl, settle_chat
from lisatune.preferences.rows import WHERE
from lisatune.settings import TrainConfig
from lisatune.tasks.base import Answer, Task

UNCUT = 2**30  # a max_length at which TRL neither cuts nor leaves out
PLAIN = {"max_length": UNCUT, "method": "full", "precompute_ref_log_probs": False, "shuffle": False, "dtype": "float32"}
TINY = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def inspect_task(config: TrainConfig, tokenizer: Any, train: Rows, held_out: HeldOut, num_rows: int) -> Inspection:
    """What the rows of a task hold. TRL's own trainer makes the tokens, around a model of a few weights.

    Args:
        config: The settings.
        tokenizer: The model's.
        train: The rows to learn from.
        held_out: Those held out.
        num_rows: How many are shown.
    """
    task = make_task(config)
    assert task is not None
    with quiet_trl():
        task.classes()  # says at once if TRL is missing
    console = Console(quiet=True)
    config = settle_chat(config, tokenizer, console)
    plain = config.model_copy(update=PLAIN)
    tiny = transformers.LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **TINY)
    for name, value in task.model_options.items():
        setattr(tiny, name, value)
    model = getattr(transformers, task.auto_class).from_config(tiny, trust_remote_code=False)
    trainer = make_trainer(plain, task, model, tokenizer, train, held_out, None, torch.device("cpu"))

    used, counts, lengths = counted(task, train, trainer.train_dataset, config.max_length)
    of_eval = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    held = [(name, rows, counted(task, rows, of_eval[name], config.max_length)[1]) for name, rows in held_out.items()]
    cut = [len(document) for document, _ in used]
    of_row = len(task.answers(trainer.train_dataset[0]))
    chosen = sorted(spread(len(used) // of_row, num_rows))
    shown = [shown_answer(*used[i * of_row + number], tokenizer) for i in chosen for number in range(of_row)]
    batch_size = config.per_device_train_batch_size
    return Inspection(
        [train.name], [train.source.describe()], train.source.told,
        [(file, count_rows(file)) for file in train.source.files if file.left_out],
        counts, lengths, config.max_length, batch_size, PaddingShares(padding(cut, batch_size, config.seed, of_row)),
        shown, special_texts(tokenizer), held,
    )  # fmt: skip


Told = tuple[Answer, bool | None]


def counted(
    task: Task, rows: Rows, tokens: Any, max_length: int
) -> tuple[list[tuple[Encoded, Told]], Counts, list[int]]:
    """The answers that are used, what became of the rows, and the tokens of each answer before anything is cut."""
    counts, used, lengths = Counts(), list[tuple[Encoded, Told]](), list[int]()
    for error in rows.bad:
        counts.skip(error)
    for example in rows.examples or ():
        counts.left_out.update(dict.fromkeys(example.left_out, 1))
    for row in tokens:
        answers = task.answers(row)
        lengths += [len(answer.ids) for answer in answers]
        if reason := task.why_left_out(answers, max_length):
            counts.refuse(reason)
            continue
        encoded = [as_cut(answer, row[WHERE], max_length) for answer in answers]
        used += [(document, (answer, row.get("label"))) for document, answer in zip(encoded, answers, strict=True)]
        lost = sum(len(answer.ids) - len(document) for document, answer in zip(encoded, answers, strict=True))
        counts.read, counts.used, counts.documents = counts.read + 1, counts.used + 1, counts.documents + len(encoded)
        counts.truncated, counts.cut_tokens = counts.truncated + bool(lost), counts.cut_tokens + lost
        counts.tokens += sum(len(document) for document in encoded)
        counts.labelled_tokens += sum(label != IGNORED for document in encoded for label in document.labels)
    return used, counts, lengths


def as_cut(answer: Answer, where: str, max_length: int) -> Encoded:
    """An answer as a document, of which ``max_length`` tokens are left."""
    end = max(max_length, answer.num_prompt if answer.whole_prompt else 0)
    labels = [IGNORED] * answer.num_prompt + answer.ids[answer.num_prompt :]
    return Encoded(array("l", answer.ids[:end]), array("l", labels[:end]), where)


def shown_answer(document: Encoded, told: Told, tokenizer: Any) -> ShownRow:
    """An answer as text, with its name and what was judged of it."""
    answer, label = told
    return replace(shown_row(document, tokenizer), answer=answer.name, label=label)
