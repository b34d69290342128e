"""Settings of the data, and the run's model and folder."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import BaseModel, field_validator

from lisatune.errors import UserError
from lisatune.settings.row import row
from lisatune.settings.task import SFT


class Places(BaseModel):
    """Model, data and output."""

    model: str = row(
        ..., "Folder, .gguf file, or hub name of the model to train.", min_length=1, place=True, one_value=True
    )
    data: str | list[dict[str, Any]] = row(
        ..., "File, folder, or hub name of the rows to train on. Several with their shares: "
        "[{path: a.jsonl, share: 0.7}, {path: org/name, split: train, config: main, share: 0.3}].",
        min_length=1, place=True, one_value=True,
    )  # fmt: skip
    output: str = row(
        ..., "Folder of the run. If it holds a run already, you can only resume that run.", min_length=1, free=True,
        one_value=True,
    )  # fmt: skip

    @field_validator("data", mode="before")
    @classmethod
    def _with_shares(cls, data: Any) -> Any:
        if isinstance(data, list) and any(isinstance(part, str) for part in data):
            raise UserError(
                "data: give each of several data sets a share, as in [{path: a.jsonl, share: 0.7}, {path: b.jsonl, share: 0.3}]"
            )
        return data

    @field_validator("output")
    @classmethod
    def _expand_home(cls, output: str) -> str:
        return os.path.expanduser(output)


class Data(BaseModel):
    """Rows and tokens."""

    max_length: int = row(
        1024, "Tokens of a row. Longer chats lose their end, longer texts are split.", ge=2, one_value=True
    )
    shuffle: bool = row(
        True,
        "False keeps the order of the data, in every epoch. Several data sets take turns by their shares.",
    )
    packing: bool = row(
        False, "Fill rows with several documents. Attention and positions keep the documents apart.", tasks=SFT
    )
    group_by_length: bool = row(
        False, "Give a batch rows of like length, so that less padding is computed. Every row still comes once in an epoch.",
        idle_with={
            "packing": "whose rows are full already", "streaming": "whose lengths are not known",
            "shuffle=false": "which keeps the order",
        }, tasks=SFT,
    )  # fmt: skip
    completion_only_loss: bool = row(
        True,
        "Learn answers only. False learns prompts too. Plain text is always learned whole.",
        one_value=True,
        tasks=SFT,
    )
    loss_on: Literal["answers", "last", "all"] = row(
        "answers", "What is learned of a chat: all answers, the last answer, or prompts too.", one_value=True,
        never_with={"completion_only_loss=false": "which learns prompts too"}, tasks=SFT,
    )  # fmt: skip
    excess_length_strategy: Literal["truncate", "drop", "refuse"] = row(
        "truncate",
        "What is done with a chat longer than max_length: cut its end, leave it out, or stop.",
        one_value=True,
        tasks=SFT,
    )
    on_bad_row: Literal["stop", "skip"] = row(
        "stop", "What is done with a row that cannot be used: stop, or leave it out and count it.", free=True
    )
    columns: dict[str, str] = row(
        {}, "Names of the data's columns where they differ: {messages: dialog, prompt: q}.", one_value=True
    )
    roles: dict[str, str] = row(
        {}, "Meaning of the data's roles where they differ: {bot: assistant, observation: tool}.", one_value=True
    )
    chat_template: str | None = row(
        None, "Chat template instead of the tokenizer's: chatml, plain, or a file of Jinja. It is saved with the model.",
        min_length=1, one_value=True,
    )  # fmt: skip
    template_date: str | None = row(
        None, "Day that a chat template writes, as 2026-11-26. Default: the day on which the run began.",
        pattern=r"^\d{4}-\d\d-\d\d$", free=True,
    )  # fmt: skip
    streaming: bool = row(
        False, "Read rows when they are needed, instead of all at the start.",
        needs={
            "max_steps": "needs max_steps: the length of a stream is not known beforehand",
            "eval_data or eval_rows=0": "cannot hold rows out of the data: give eval_data=<file>",
        },
        never_with={"dataset_prepared_path": "which keeps encoded rows"}, tasks=SFT,
    )  # fmt: skip
    dataset_config: str | None = row(None, "Configuration of a hub data set or a folder with several.", one_value=True)
    dataset_split: str = row("train", "Split of a hub data set or of a folder with splits.", one_value=True)
    dataset_num_proc: int | None = row(None, "Processes that encode large data. Default: all cores.", ge=1, free=True)
    dataset_prepared_path: str | None = row(
        None, "Folder of encoded rows, which later runs use again. Large data are always kept so, in ~/.cache/lisatune.",
        min_length=1, free=True, place=True, tasks=SFT,
    )  # fmt: skip
