"""Chats to text in a chat template, cut where the answers that are learned begin and end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

from lisatune.data.formats import REASONING_KEYS, Example, Message
from lisatune.errors import UserError

LossOn = Literal["answers", "last", "all"]
OUR_ARGUMENTS = ("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "tokenize", "documents")

# For a tokenizer that brings no chat template of its own; saved with the model, so that chat and training agree.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)


# ChatML with tools and calls in the tags that Hermes and Qwen have made usual
CHATML_TEMPLATE = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% if tools %}{{ '<|im_start|>system\n' + (system + '\n\n' if system else '') "
    "+ 'You can call these functions:\n<tools>\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    "{{ '</tools>\nWrite a call as JSON with name and arguments between <tool_call> and </tool_call>.<|im_end|>\n' }}"
    "{% elif system %}{{ '<|im_start|>system\n' + system + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{% if message.role != 'system' or not loop.first %}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.reasoning_content %}{{ '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{{ message.content }}{% for call in message.tool_calls or [] %}"
    "{{ ('\n' if message.content or not loop.first else '') + '<tool_call>\n{\"name\": ' }}{{ call.function.name | tojson }}"
    "{{ ', \"arguments\": ' }}{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def find_template(name: str, tokenizer: Any) -> str:
    """The chat template that the setting ``chat_template`` names: ``chatml``, ``plain``, one of the tokenizer's, or a file.

    Raises: UserError if there is none.
    """
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if name in own:
        return str(own[name])
    if name == "chatml":
        return _begun(tokenizer, CHATML_TEMPLATE)
    if name == "plain":
        return plain_template(tokenizer)
    path = Path(name).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        known = ", ".join(["chatml", "plain", *own])
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"chat_template={name}: no such template, and no file that can be read ({reason}); give one of {known}, or a file"
        ) from error


def plain_template(tokenizer: Any) -> str:
    """``PLAIN_TEMPLATE``, for a tokenizer that has no template of its own."""
    return _begun(tokenizer, PLAIN_TEMPLATE)


def _begun(tokenizer: Any, template: str) -> str:
    """``template`` after the beginning-of-text token, where the tokenizer puts one before text too."""
    bos = tokenizer.bos_token_id
    begins = bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]
    return "{{ bos_token }}" * begins + template


@dataclass(frozen=True)
class Piece:
    """A part of a rendered chat; ``weight`` is what its loss counts, 0 for what is not learned."""

    text: str
    weight: float = 0.0


@dataclass(frozen=True)
class Rendered:
    """What becomes of a chat.

    Attributes:
        rows: One row of pieces; or one for each answer, where the template rewrites earlier turns.
        missing: What the template does not show.
        why: Why there is no row.
    """

    rows: list[list[Piece]]
    missing: tuple[str, ...] = ()
    why: str = ""


class Renderer:
    """Chats in a tokenizer's template.

    The prompt of an answer is what generation would be given: the earlier turns with ``add_generation_prompt``. What
    follows in the rendering of the chat up to the answer is learned. Answers share a row as far as each one's prompt is
    the beginning of that row; others get a row of their own.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        loss_on: ``answers`` learns all of them, ``last`` the last one, ``all`` the prompts too.
        today: What the template is told as the date; the day's own, if not given.
    """

    def __init__(self, tokenizer: Any, loss_on: LossOn = "answers", today: date | None = None) -> None:
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        template = tokenizer.chat_template
        self.source = template if isinstance(template, str) else " ".join(map(str, (template or {}).values()))
        self.reasoning_keys = [key for key in REASONING_KEYS if re.search(rf"""\.{key}\b|(['"]){key}\1""", self.source)]
        self.options: dict[str, Any] = {}
        if today is not None and isinstance(template, str) and writes_date(template):
            self.options["chat_template"] = with_date(template, today)
        self.end_texts = tuple({str(token) for token in _added(tokenizer)} | {tokenizer.eos_token or "\0"})

    def __call__(self, example: Example) -> Rendered:
        """The rows of ``example``, a chat.

        Raises: UserError if the template refuses the chat, or answers cannot be told from prompts.
        """
        chat = self._prepared(example)
        answers = [i for i, turn in enumerate(chat) if turn["role"] == "assistant" and not _is_blank(turn)]
        if not answers:
            return Rendered([], why="the answer is empty")
        if self.loss_on == "all":
            rows = [self._all_of(example, chat, answers)]
            return Rendered(rows, self._missing(example, chat, answers, rows))
        learned = [i for i in answers[-1:] if self.loss_on == "last"] or answers
        learned = [i for i in learned if example.weight(i) and i >= example.num_prompt]
        if not learned:
            return Rendered([], why="no turn is to be learned")
        rows = list(self._rows(example, chat, learned))
        return Rendered(rows[::-1], self._missing(example, chat, learned, rows))

    def _rows(self, example: Example, chat: list[Message], learned: list[int]) -> Iterator[list[Piece]]:
        """Rows from the last answer back; each takes the earlier answers that it shows as generation would."""
        while learned:
            pieces, covered = self._row(example, chat, learned)
            yield pieces
            learned = [i for i in learned if i not in covered]

    def _row(self, example: Example, chat: list[Message], learned: list[int]) -> tuple[list[Piece], set[int]]:
        *earlier, last = learned
        last_prompt, last_answer = self._located(example, chat, last)
        text = last_prompt + last_answer
        pieces, covered, done = [], {last}, 0
        for i in earlier:
            prompt, answer = self._spans(example, chat, i)
            end = prompt + answer
            stable = text.startswith(end) and done <= len(prompt) <= len(end) <= len(last_prompt)
            if answer and stable and answer.endswith(self.end_texts):
                pieces += [Piece(text[done : len(prompt)]), Piece(answer, example.weight(i))]
                covered.add(i)
                done = len(end)
        pieces += [Piece(last_prompt[done:]), Piece(last_answer, example.weight(last))]
        return pieces, covered

    def _spans(self, example: Example, chat: list[Message], i: int) -> tuple[str, str]:
        """The prompt of answer ``i`` and the answer; it is empty where the rendering does not go on from the prompt."""
        prompt = self.render(example, chat[:i], add_generation_prompt=True)
        shown = self.render(example, chat[: i + 1])
        return prompt, self._closed(shown[len(prompt) :], chat[i]) if shown.startswith(prompt) else ""

    def _located(self, example: Example, chat: list[Message], i: int) -> tuple[str, str]:
        """``_spans``, and the answer where the prompt that generation sees is not how the rendering begins.

        Raises: UserError if the answer cannot be told from its prompt.
        """
        prompt, answer = self._spans(example, chat, i)
        if answer:
            return prompt, answer
        shown = self.render(example, chat[: i + 1])
        rest = _after_opened(prompt, shown, chat[i]) or self._after_header(example, chat[:i], prompt, shown)
        thought, content = _thought_of(chat[i])
        if rest is not None and content.strip() in rest:
            return prompt, self._closed(rest, {**chat[i], "content": content})
        if thought:  # a prompt that closes the thought leaves no room for one; it is named as not shown
            bare: Any = {key: value for key, value in chat[i].items() if key not in REASONING_KEYS} | {
                "content": content
            }
            return self._located(example, [*chat[:i], bare], i)
        raise UserError(
            f"{example.where}: the chat template rewrites earlier turns, so it is not clear which tokens are answers; "
            "give another chat_template, or learn the whole chat with completion_only_loss=false"
        )

    def _after_header(self, example: Example, before: list[Message], prompt: str, shown: str) -> str | None:
        """What follows the last beginning of an answer that the template writes at the end of ``prompt``."""
        begun = self.render(example, before)
        header = prompt[len(begun) :] if prompt.startswith(begun) else ""
        other = self.render(example, [*before, Message(role="assistant", content="\0")])
        at = shown.rfind(header, 0, _num_common(shown, other)) if header.strip() else -1
        return shown[at + len(header) :] if at >= 0 else None

    def _closed(self, shown: str, turn: Mapping[str, Any]) -> str:
        """An answer up to its end; newlines that the template puts between turns are not of it, its own are.

        Some templates write the end-of-text token after the last turn, on a line of its own: it is not of the turn either.
        """
        stripped = shown.rstrip()
        if stripped.endswith(self.end_texts):
            end = self.tokenizer.eos_token
            before = stripped.removesuffix(end) if end else stripped
            return (
                before.rstrip() if before != before.rstrip() and before.rstrip().endswith(self.end_texts) else stripped
            )
        content = turn["content"]
        own = shown.startswith(content) and not shown[len(content) :].strip() and not turn.get("tool_calls")
        return content if own else stripped

    def _all_of(self, example: Example, chat: list[Message], answers: list[int]) -> list[Piece]:
        """Prompts and answers, all learned; in one piece where they cannot be told apart."""
        try:
            pieces, covered = self._row(example, chat, answers)
        except UserError:
            covered = set()
        if covered == set(answers):
            return [Piece(piece.text, piece.weight if k % 2 else 1.0) for k, piece in enumerate(pieces)]
        if any(example.weight(i) != 1 for i in answers):
            raise UserError(
                f"{example.where}: the chat template rewrites earlier turns, so weights of turns do not work with "
                "completion_only_loss=false; leave that out, or remove the weights"
            )
        return [Piece(self._closed(self.render(example, chat[: answers[-1] + 1]), chat[answers[-1]]), 1.0)]

    def render(self, example: Example, chat: Sequence[Message], **options: Any) -> str:
        """``chat`` as the template writes it.

        Raises: UserError naming the row if it refuses.
        """
        options |= {"tokenize": False, "tools": list(example.tools) or None, **self.options, **example.template_kwargs}
        try:
            text: str = self.tokenizer.apply_chat_template(list(chat), **options)
        except Exception as error:  # templates raise what they like, by jinja
            raise UserError(
                f"{example.where}: the chat template refuses this chat ({error}); fix or remove the row, or give another chat_template"
            ) from error
        return text

    # -- what a template can show ------------------------------------------------------------------------------------

    def _prepared(self, example: Example) -> list[Message]:
        """The chat in the names that the template knows."""
        if taken := [name for name in example.template_kwargs if name in OUR_ARGUMENTS]:
            raise UserError(f"{example.where}: chat_template_kwargs cannot set {taken[0]}; leave it out")
        chat = [self._turn(example, i, turn) for i, turn in enumerate(example.messages)]
        return self._with_calls_shown(example, chat) if any("tool_calls" in turn for turn in chat) else chat

    def _with_calls_shown(self, example: Example, chat: list[Message]) -> list[Message]:
        """``chat`` in the form in which the template shows its calls: some need text as arguments.

        Raises: UserError if it shows them in none.
        """
        refusal = UserError(
            f"{example.where}: the chat template does not show all tool calls of this chat; give one that does by "
            "chat_template=<file>, or remove the row"
        )
        for number, form in enumerate((chat, _with_text_arguments(chat))):
            marked, marks = _marked_calls(form)
            try:
                text = self.render(example, marked)
            except UserError as error:
                refusal = error if number == 0 else refusal
                continue
            if all(mark in text for mark in marks):
                return form
        raise refusal

    def _turn(self, example: Example, i: int, given: Message) -> Message:
        turn: Message = {**given}
        if turn["role"] == "developer" and "developer" not in self.source:
            turn["role"] = "system"
        if turn.get("tool_calls") and "tool_calls" not in self.source:
            if i not in example.call_texts:
                raise UserError(
                    f"{example.where}: turn {i + 1} calls a tool, but the chat template shows no tool calls; set "
                    "chat_template=<file> to one that does, or remove the row"
                )
            turn["content"] = example.call_texts[i]
            del turn["tool_calls"]
        reasoning = turn.get("reasoning_content")
        if reasoning and self.reasoning_keys:
            turn |= dict.fromkeys(self.reasoning_keys, reasoning)  # type: ignore[typeddict-item]
        elif reasoning and "</think>" in self.source:
            turn["content"] = f"<think>\n{reasoning.strip()}\n</think>\n\n{turn['content']}"
        return turn

    def _missing(
        self, example: Example, chat: Sequence[Message], learned: Sequence[int], rows: Sequence[Sequence[Piece]]
    ) -> tuple[str, ...]:
        """What the rows do not hold of the chat up to its last answer, and of the reasoning of learned answers."""
        text = "".join(piece.text for row in rows for piece in row)
        answers = "".join(piece.text for row in rows for piece in row if piece.weight)
        missing = dict.fromkeys(_not_in(text, chat))
        for i, turn in enumerate(chat):
            if turn["role"] == "assistant" and _thought_of(turn)[0] not in (answers if i in learned else text):
                missing["reasoning_content" if turn.get("reasoning_content") else "thoughts of an answer"] = None
        if any(tool["function"]["name"] not in text for tool in example.tools):
            missing["tools"] = None
        return tuple(f"{name} (not shown by the chat template)" for name in missing)


def _not_in(text: str, chat: Sequence[Message]) -> Iterator[str]:
    last = max(i for i, turn in enumerate(chat) if turn["role"] == "assistant")
    for turn in chat[: last + 1]:
        if turn["role"] != "assistant" and turn["content"].strip() not in text:
            yield f"{turn['role']} turns"
        for key in ("name", "tool_call_id"):
            if key in turn and str(turn[key]) not in text:  # type: ignore[literal-required]
                yield key
    if last + 1 < len(chat):
        yield "turns after the last answer"


def _num_common(one: str, other: str) -> int:
    """How many letters two texts begin with in common."""
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _after_opened(prompt: str, shown: str, turn: Mapping[str, Any]) -> str | None:
    """The answer in ``shown`` where ``prompt`` differs from its beginning by a thought that it opens, or by white space."""
    common = _num_common(prompt, shown)
    thought, content = _thought_of(turn)
    opened = re.search(r"([<\[])(\w+)([>\]])\s*$", prompt)
    if opened and common < opened.end(3) and not prompt[common : opened.start()].strip():
        rest = shown[min(common, opened.start()) :]
        begins = rest.lstrip().startswith(content.strip()) and rest.strip()
        return f"{thought}\n{opened[1]}/{opened[2]}{opened[3]}\n\n{rest.lstrip()}" if begins else None
    left, rest = prompt[common:], shown[common:]
    closed = re.match(rf"\s*(?:{re.escape(thought)}\s*)?(?:[<\[]/\w+[>\]]\s*)?", rest)
    goes_on = not left.strip() and closed and rest.strip() and rest[closed.end() :].startswith(content.strip())
    return rest if goes_on else None


def _is_blank(turn: Message) -> bool:
    return not (turn["content"].strip() or turn.get("tool_calls") or turn.get("reasoning_content"))


def _thought_of(turn: Mapping[str, Any]) -> tuple[str, str]:
    """The reasoning of an answer and the rest of it."""
    content = turn["content"]
    if "</think>" in content:
        thought, _, content = content.rpartition("</think>")
        return thought.rpartition("<think>")[2].strip(), content.lstrip()
    return str(turn.get("reasoning_content") or "").strip(), content


def _with_text_arguments(chat: Sequence[Message]) -> list[Message]:
    return [
        _changed_calls(turn, lambda call: {"arguments": json.dumps(call["arguments"], ensure_ascii=False)})
        for turn in chat
    ]


def _marked_calls(chat: Sequence[Message]) -> tuple[list[Message], list[str]]:
    """``chat`` with functions renamed, each call by a name that is nowhere else, and those names."""
    marks: list[str] = []

    def mark(call: Mapping[str, Any]) -> dict[str, str]:
        marks.append(f"marked_call_{len(marks)}_")
        return {"name": marks[-1]}

    return [_changed_calls(turn, mark) for turn in chat], marks


def _changed_calls(turn: Message, change: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Message:
    calls = [
        {**call, "function": {**call["function"], **change(call["function"])}} for call in turn.get("tool_calls", ())
    ]
    return {**turn, "tool_calls": calls} if calls else turn


def _added(tokenizer: Any) -> list[Any]:
    return list(getattr(tokenizer, "added_tokens_decoder", {}).values())


# -- the date --------------------------------------------------------------------------------------------------------


def writes_date(template: Any) -> bool:
    """Whether a chat template writes the day on which it is used."""
    return isinstance(template, str) and "strftime_now" in template


def with_date(template: str, day: date) -> str:
    """``template`` for which it is always ``day``.

    Example:
        >>> with_date("{{ strftime_now('%Y') }}", date(2026, 11, 26))[-30:]
        "cro %}{{ strftime_now('%Y') }}"
    """
    formats = dict.fromkeys(re.findall(r"strftime_now\(\s*(?:\"([^\"]*)\"|'([^']*)')\s*\)", template))
    branches = "".join(
        f"{{% if format == {json.dumps(a or b)} %}}{day.strftime(a or b)}{{% endif %}}" for a, b in formats
    )
    return f"{{% macro strftime_now(format) %}}{branches}{{% endmacro %}}{template}"
