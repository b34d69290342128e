"""Settings of the data, and the run's model and folder."""

from __future__ import annotations

import os

from pydantic import BaseModel, field_validator

from lisatune.settings.row import row


class Places(BaseModel):
    """Model, data and output."""

    model: str = row(
        ..., "Folder, .gguf file, or hub name of the model to train.", min_length=1, place=True, one_value=True
    )
    data: str = row(..., "File, folder, or hub name of the rows to train on.", min_length=1, place=True, one_value=True)
    output: str = row(
        ..., "Folder of the run. If it holds a run already, you can only resume that run.", min_length=1, free=True,
        one_value=True,
    )  # fmt: skip

    @field_validator("output")
    @classmethod
    def _expand_home(cls, output: str) -> str:
        return os.path.expanduser(output)


class Data(BaseModel):
    """Rows and tokens."""

    max_length: int = row(
        1024, "Tokens of a row. Longer chats lose their end, longer texts are split.", ge=2, one_value=True
    )
    packing: bool = row(False, "Fill rows with several documents. Attention and positions keep the documents apart.")
    completion_only_loss: bool = row(
        True, "Learn answers only. False learns prompts too. Plain text is always learnt whole.", one_value=True
    )
    streaming: bool = row(
        False, "Read rows when they are needed, instead of all at the start.",
        needs={
            "max_steps": "needs max_steps: the length of a stream is not known beforehand",
            "eval_data or eval_rows=0": "cannot hold rows out of the data: give eval_data=<file>",
        },
    )  # fmt: skip
    dataset_config: str | None = row(None, "Configuration of a hub data set that has several.", one_value=True)
    dataset_split: str = row("train", "Split of a hub data set.", one_value=True)
