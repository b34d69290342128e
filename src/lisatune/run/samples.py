"""``samples.jsonl``: what the model answers to a few prompts, before training and at each evaluation."""

from __future__ import annotations

import json
import os
from types import TracebackType
from typing import Self

from rich.console import Console

from lisatune.common.console import tell
from lisatune.common.lines import drop_later_lines, step_of
from lisatune.errors import UserError, one_line, shown
from lisatune.models.chat import Chat
from lisatune.models.load import learned_positions
from lisatune.run.build import Run

MAX_NEW_TOKENS = 128
SHOWN_LETTERS = 300  # letters of a prompt or an answer in the terminal


class Samples:
    """Asks a model and writes each answer down, a line of JSON: step, prompt, answer.

    Args:
        run: The run. Its model is left in the mode it was in, and nothing is drawn at random.
        console: Where answers are shown.
        num_steps: Steps that are done. Lines of later ones go: a resumed run writes them again.
    Raises: UserError if the model has not learned enough positions for a prompt and its answer.
    """

    def __init__(self, run: Run, console: Console, num_steps: int = 0) -> None:
        self._model, self._tokenizer, self._console = run.learner.model, run.tokenizer, console
        prompts = run.config.samples or []
        self._prompts = [prompts] if isinstance(prompts, str) else prompts
        self._check_positions()
        path = run.folder / "samples.jsonl"
        drop_later_lines(path, num_steps, step_of=step_of)
        self._file = path.open("a", encoding="utf-8")

    def _check_positions(self) -> None:
        room = learned_positions(self._model) - MAX_NEW_TOKENS
        for prompt in self._prompts:
            if Chat(self._model, self._tokenizer).encode(prompt)["input_ids"].shape[1] > room:
                raise UserError(
                    f"samples: a prompt may have {max(0, room):,} tokens with this model, so leave {shown(prompt)} out: an answer has up "
                    f"to {MAX_NEW_TOKENS}"
                )

    def write(self, step: int) -> None:
        """Ask and write after ``step`` steps."""
        training = self._model.training
        self._model.eval()
        for prompt in self._prompts:
            answer = Chat(self._model, self._tokenizer, max_new_tokens=MAX_NEW_TOKENS).ask(prompt)
            self._file.write(json.dumps({"step": step, "prompt": prompt, "answer": answer}) + "\n")
            asked, said = (one_line(text, SHOWN_LETTERS) for text in (prompt, answer))
            tell(self._console, f"step {step:,}: {asked} -> {said}")
        self._file.flush()
        self._model.train(training)

    def sync(self) -> None:
        """Wait until all lines are on the disk; a checkpoint relies on them."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()
