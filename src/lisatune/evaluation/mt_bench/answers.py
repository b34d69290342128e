"""A model's answers to two-turn questions, made in batches and kept as they are made.

Shapes: B conversations, T positions of the longest of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lisatune.data.tokenize import plain_template
from lisatune.errors import UserError
from lisatune.evaluation.mt_bench.questions import NUM_TURNS, Question
from lisatune.evaluation.mt_bench.records import Records, key_of
from lisatune.models.load import end_tokens, load_model, pick_device
from lisatune.models.names import model_of, trusts_code
from lisatune.plan.forecast import model_config

SUFFIXES = (
    ".safetensors",
    ".gguf",
    ".json",
    ".jinja",
    ".model",
)  # what an answer depends on: weights, tokenizer, settings


@dataclass(frozen=True)
class Answers:
    """A model's answers to one question.

    Attributes:
        texts: One for each turn.
        num_cut: How many of them ended because they reached the limit of length.
    """

    texts: tuple[str, ...]
    num_cut: int


class Answerer:
    """Answers of one model; it is loaded when the first answer is missing.

    Args:
        name: A run's folder, a model's folder, a ``.gguf`` file or a hub name.
        records: Where answers are kept, under the hash of the model's files, the conversation and the limit of length.
        max_new_tokens: Tokens of one answer at most.
        batch_size: B, conversations that are answered together. In float32 answers do not depend on it, except where two
            tokens are equally likely to the last digit.
        device: ``cpu``, ``cuda``, ... or ``auto``.
    """

    def __init__(
        self,
        name: str,
        records: Records,
        *,
        max_new_tokens: int = 1024,
        batch_size: int = 8,
        device: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        self.name = model_of(name)
        self.records = records
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.device = pick_device(device)
        self.trust_remote_code = trust_remote_code
        self._digest = digest_of(self.name)

    def answers(
        self, questions: Sequence[Question], advance: Callable[[int], None] = lambda num: None
    ) -> list[Answers]:
        """Both turns of each question, greedily; a second turn sees the first and its answer.

        ``advance`` is called with the number of answers that came, whether they were there or made.
        """
        chats: list[list[dict[str, str]]] = [[] for _ in questions]
        cut = [0] * len(questions)
        for turn in range(NUM_TURNS):
            for chat, question in zip(chats, questions, strict=True):
                chat.append({"role": "user", "content": question.turns[turn]})
            kept = [i for i, chat in enumerate(chats) if self.records.get(self._key(chat)) is not None]
            advance(len(kept))
            self._make([(questions[i].id, chat) for i, chat in enumerate(chats) if i not in set(kept)], advance)
            for i, chat in enumerate(chats):
                record = self.records.get(self._key(chat))
                assert record is not None
                cut[i] += record["cut"]
                chat.append({"role": "assistant", "content": record["answer"]})
        texts = [tuple(message["content"] for message in chat if message["role"] == "assistant") for chat in chats]
        return [Answers(answer, num) for answer, num in zip(texts, cut, strict=True)]

    def num_missing(self, questions: Sequence[Question]) -> int:
        """How many first answers are still to be made; what the second ones are asked depends on them."""
        return sum(self.records.get(self._key([{"role": "user", "content": q.turns[0]}])) is None for q in questions)

    def _key(self, chat: Sequence[Mapping[str, str]]) -> str:
        return key_of(model=self._digest, chat=list(chat), max_new_tokens=self.max_new_tokens)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        model, tokenizer = load_model(
            self.name, dtype, trust_remote_code=self.trust_remote_code or trusts_code(self.name)
        )
        tokenizer.chat_template = tokenizer.chat_template or plain_template(tokenizer)  # the same as in training
        return model.to(self.device), tokenizer

    def _make(self, asked: Sequence[tuple[str, list[dict[str, str]]]], advance: Callable[[int], None]) -> None:
        """Answer the chats of ``asked`` and keep the answers, batch by batch."""
        if not asked:
            return
        model, tokenizer = self._loaded
        prompts = [render(tokenizer, chat) for _, chat in asked]
        lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
        rooms = [min(self.max_new_tokens, context_of(model) - length) for length in lengths]
        for batch in batches_of(lengths, rooms, self.max_new_tokens, self.batch_size):
            made = generate(model, tokenizer, [prompts[i] for i in batch], min(rooms[i] for i in batch))
            for i, (answer, num_tokens, cut) in zip(batch, made, strict=True):
                question, chat = asked[i]
                record = {"model": self.name, "question_id": question, "turn": (len(chat) + 1) // 2}
                record |= {"answer": answer, "num_tokens": num_tokens, "cut": cut}
                self.records.add(self._key(chat), record)
                advance(1)


def render(tokenizer: Any, chat: Sequence[Mapping[str, str]]) -> str:
    """``chat`` in the tokenizer's template, up to where the answer begins."""
    try:
        text: str = tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like, by jinja
        raise UserError(
            f"the model's chat template refuses a conversation of two turns ({error}): give another"
        ) from error
    return text


def batches_of(lengths: Sequence[int], rooms: Sequence[int], most: int, batch_size: int) -> Iterator[list[int]]:
    """Indices of prompts to be answered together, of similar length; one with less room than ``most`` goes alone.

    Alone, since a batch has one limit of length, and a long prompt must not cut the answers of others.

    Example:
        >>> list(batches_of([5, 90, 4, 6], [8, 8, 8, 2], 8, 2))
        [[2, 0], [1], [3]]
    """
    free = sorted((i for i, room in enumerate(rooms) if room >= most), key=lambda i: lengths[i])
    yield from (free[start : start + batch_size] for start in range(0, len(free), batch_size))
    yield from ([i] for i, room in enumerate(rooms) if room < most)


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[tuple[str, int, bool]]:
    """The likeliest continuation of each of B rendered prompts, padded on the left.

    Returns: Text, number of its tokens, and whether it was cut, for each prompt. Without room for a token: nothing, cut.
    """
    if max_new_tokens < 1:
        return [("", 0, True) for _ in prompts]
    inputs = tokenizer(
        list(prompts), add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    ).to(model.device)
    ends = end_tokens(model, tokenizer)
    out = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,  # a model's own settings of sampling, which would be warned of
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends or None,
    )
    made = []
    for ids in out[:, inputs["input_ids"].shape[1] :].tolist():  # (B, T) -> each row's new tokens
        end = next((i for i, token in enumerate(ids) if token in ends), None)
        kept = ids if end is None else ids[:end]
        made.append((tokenizer.decode(kept, skip_special_tokens=True).strip(), len(kept), end is None))
    return made


def context_of(model: Any) -> int:
    """Positions that the model was made for; no limit is known of some."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31)


def digest_of(name: str) -> str:
    """A hash of a local model's files; a hub name stands for the commit it leads to.

    Costs one read of the weights, which loading them needs anyway.
    """
    path = Path(name).expanduser()
    if not path.exists():
        return f"{name}@{getattr(model_config(name), '_commit_hash', None)}"
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
