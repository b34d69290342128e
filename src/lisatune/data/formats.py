"""Rows of a data set to chats or text. Knows nothing of tokens, and needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypedDict

from lisatune.data.files import MAX_SHOWN, find_files, shown
from lisatune.data.read import OnBadRow, Row, read_rows, stop
from lisatune.errors import UserError, did_you_mean

__all__ = ["Example", "Message", "Row", "RowParser", "find_files", "parse_row", "parse_rows", "read_rows"]

# columns of a question and its answer, in the order in which they are looked for
PAIRS = (("prompt", "completion"), ("question", "answer"), ("problem", "solution"))
OTHER_PAIRS = (("query", "response"), ("question", "response"), ("prompt", "response"), ("input", "output"))
INSTRUCTIONS = (("input", "output"), ("context", "response"))  # Alpaca's names, and Dolly's
SYSTEM_COLUMNS = ("system", "system_prompt")
TOOL_COLUMNS = ("tools", "functions")  # OpenAI's names, now and before
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
SIDE_COLUMNS = (*SYSTEM_COLUMNS, "history", *TOOL_COLUMNS, "chat_template_kwargs", *REASONING_KEYS)
COLUMNS = tuple(dict.fromkeys(
    ["messages", "conversations", *(name for pair in (*PAIRS, *OTHER_PAIRS) for name in pair), "instruction", "context",
     "text", *SIDE_COLUMNS]
))  # fmt: skip
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
    "system": "system",
    "developer": "developer",
}
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
TRAIN_KEYS = ("train", "training", "loss")  # axolotl's names, and ms-swift's
CALL_KEYS = ("tool_calls", "function_call")  # OpenAI's, now and before
PASSED_KEYS = ("name", "tool_call_id")  # handed to the template as they are
TURN_KEYS = (*ROLE_KEYS, *CONTENT_KEYS, *REASONING_KEYS, *TRAIN_KEYS, "weight", *CALL_KEYS, *PASSED_KEYS)
KNOWN_COLUMNS = (
    "messages; prompt and completion; instruction, input and output (or context and response); conversations; "
    "question and answer; text; or set columns={messages: dialog} if a column has another name"
)


class Message(TypedDict, total=False):
    """One turn as a chat template gets it; ``role`` and ``content`` are always there."""

    role: str
    content: str
    reasoning_content: str
    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    name: str


@dataclass(frozen=True)
class Example:
    """One training example: a chat, or plain text.

    Attributes:
        where: The row's place.
        messages: The chat's turns; empty for text.
        text: The text; None for a chat.
        tools: The tools that the chat may call, as JSON schemas.
        weights: What each turn's loss counts; 0 is not learned. Empty: 1 for the assistant's turns, 0 for others.
        num_prompt: How many first turns are a prompt, whose answers are not learned: those of a ``prompt`` column.
        template_kwargs: Further arguments of the chat template.
        call_texts: Turn to the text that stood for its tool calls, for a template that shows no calls.
        left_out: Columns of the row and keys of its turns that play no part.
        source: Number of the data set, where a run has several.
    """

    where: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    weights: tuple[float, ...] = ()
    num_prompt: int = 0
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    call_texts: Mapping[int, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    source: int = 0

    def __repr__(self) -> str:
        """What is learned: comparisons recognise their data by it, and must not see a column that plays no part."""
        parts = {name: getattr(self, name) for name in ("tools", "weights", "num_prompt", "template_kwargs", "source")}
        told = "".join(f", {name}={value!r}" for name, value in parts.items() if value)
        return f"Example(where={self.where!r}, messages={self.messages!r}, text={self.text!r}{told})"

    def weight(self, turn: int) -> float:
        """What the loss of ``turn`` counts, if it is learned."""
        if self.weights:
            return self.weights[turn]
        return float(self.messages[turn]["role"] == "assistant")


def parse_row(row: Row) -> Example:
    """Recognise a row by its columns.

    ================================  =================================================================
    columns                           becomes
    ================================  =================================================================
    messages                          the chat; role and content each
    conversations                     the chat (ShareGPT); from (human, gpt, system) and value each
    prompt, completion                a question and an answer; strings, or lists of messages
    question, answer                  the same; so do problem, solution
    instruction, input, output        the same; the input, if any, follows after an empty line
    instruction, context, response    the same
    text                              text, all of it learned
    query, response; input, output    a question and an answer; so do question or prompt with response
    ================================  =================================================================

    Beside a chat, ``system`` or ``system_prompt`` is its first turn, ``history`` what was said before, ``tools`` what
    may be called. Every other column is named in ``left_out``. A column that is null is not there.

    Raises: UserError that names the place and the remedy.
    Example:
        >>> parse_row(Row("x.jsonl, line 1", {"prompt": "2+2?", "completion": "4"})).messages
        ({'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'})
    """
    return RowParser()(row)


def parse_rows(rows: Iterator[Row], parser: RowParser, on_bad: OnBadRow = stop) -> Iterator[Example]:
    """The examples of ``rows``; a bad one goes to ``on_bad``."""
    for row in rows:
        try:
            example = parser(row)
        except UserError as error:
            on_bad(error)
            continue
        yield example


@dataclass(frozen=True)
class RowParser:
    """``parse_row`` for data with names of its own.

    Args:
        columns: Our name of a column, or of a turn's ``role`` and ``content``, to the data's.
        roles: The data's name of a role to ours.
        source: Number of the data set, where a run has several.
    Raises: UserError for a name that is none of ours.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    source: int = 0

    known: ClassVar[tuple[str, ...]] = (*COLUMNS, "role", "content")  # what ``columns`` may name

    def __post_init__(self) -> None:
        known = self.known
        for name in self.columns:
            if name not in known:
                raise UserError(
                    f"columns: '{shown(name)}' is not one of {', '.join(known)}{did_you_mean(name, known)}; write our name "
                    "first, as in columns={messages: dialog}"
                )
        for role, ours in self.roles.items():
            if ours not in ROLES.values():
                raise UserError(
                    f"roles: {shown(role)} cannot be '{shown(ours)}'; choose one of {', '.join(dict.fromkeys(ROLES.values()))}"
                )

    def __call__(self, row: Row) -> Example:
        """The example of ``row``."""
        return RowReader(row, self).example()


class RowReader:
    """Reads one row, and keeps what it has used."""

    def __init__(self, row: Row, parser: RowParser) -> None:
        self.row = row
        self.parser = parser
        self.used: set[str] = set()
        self.left_out: dict[str, None] = {}
        self.columns = self._renamed()
        self.call_texts: dict[int, str] = {}
        self.num_prompt = 0

    def _renamed(self) -> Mapping[str, Any]:
        names = self.parser.columns
        if not names:
            return self.row.columns
        columns = {name: value for name, value in self.row.columns.items() if name not in names.values()}
        for ours, theirs in names.items():
            if theirs in self.row.columns:
                if _holds(columns.get(ours)):
                    self._leave_out([f"{ours} ({theirs} stands for it)"])
                columns[ours] = self.row.columns[theirs]
            elif ours in COLUMNS:
                self._leave_out([f"{theirs} (which columns asks for) is not there"])
        return columns

    def example(self) -> Example:
        """The example; see ``parse_row``."""
        there = {name for name, value in self.columns.items() if value is not None}
        found = self._chat_or_text(there) or self._chat_or_text(self.columns.keys())  # the latter tells what is null
        if found is None:
            raise self._unrecognised()
        if isinstance(found, str):
            return Example(self.row.where, text=found, left_out=self._unused(), source=self.parser.source)
        messages, weights = self._before(*found)
        self._check_chat(messages)
        tools = tuple(self._tools())
        kwargs = self._object("chat_template_kwargs")
        plain = all(
            weight == float(message["role"] == "assistant") for message, weight in zip(messages, weights, strict=True)
        )
        return Example(
            self.row.where, tuple(messages), tools=tools, weights=() if plain else tuple(weights), num_prompt=self.num_prompt,
            template_kwargs=kwargs, call_texts=self.call_texts, left_out=self._unused(), source=self.parser.source,
        )  # fmt: skip

    # -- the chat ----------------------------------------------------------------------------------------------------

    def _chat_or_text(self, there: Set[str]) -> tuple[list[Message], list[float]] | str | None:
        """What the columns ``there`` hold, in the order in which formats are looked for."""
        for name in ("messages", "conversations"):
            if name in there:
                return self._chat(self._take(name), name)
        for question, answer in PAIRS:
            if question in there and answer in there:
                if isinstance(self.columns[question], list) or isinstance(self.columns[answer], list):
                    return self._two_lists(question, answer)
                return self._pair(question, answer)
        for extra, answer in INSTRUCTIONS:
            if "instruction" in there and answer in there:
                other = next(name for name, _ in INSTRUCTIONS if name != extra)
                return self._pair("instruction", answer, other if extra not in there and other in there else extra)
        if "text" in there:
            return self._string("text")
        return next((self._pair(*names) for names in OTHER_PAIRS if there >= set(names)), None)

    def _two_lists(self, question: str, answer: str) -> tuple[list[Message], list[float]]:
        """A prompt of several turns; answers in it are not learned."""
        prompt = self._as_turns(question, "user")
        messages, weights = self._chat([*prompt, *self._as_turns(answer, "assistant")])
        for number, turn in enumerate(prompt):
            if messages[number]["role"] == "assistant":
                self._leave_out(
                    f"{key} of an answer in the {question}" for key in (*TRAIN_KEYS, "weight") if turn.get(key)
                )
                weights[number] = 1.0
        self.num_prompt = len(prompt)
        return messages, weights

    def _as_turns(self, column: str, role: str) -> list[Any]:
        value = self._take(column)
        return value if isinstance(value, list) else [{"role": role, "content": value}]

    def _pair(self, question: str, answer: str, extra: str | None = None) -> tuple[list[Message], list[float]]:
        asked = self._string(question)
        if extra is not None and (more := self._string(extra, default="")).strip():
            asked = f"{asked}\n\n{more}"
        reply = Message(role="assistant", content=self._string(answer))
        if reasoning := next((name for name in REASONING_KEYS if self.columns.get(name)), None):
            reply["reasoning_content"] = self._string(reasoning)
        return [Message(role="user", content=asked), reply], [0.0, 1.0]

    def _before(self, messages: list[Message], weights: list[float]) -> tuple[list[Message], list[float]]:
        """The chat with what columns beside it say came before: the system prompt, and earlier turns."""
        history = self._history()
        if history:
            at = int(bool(messages) and messages[0]["role"] == "system")
            messages = [*messages[:at], *history, *messages[at:]]
            weights = [*weights[:at], *(float(turn["role"] == "assistant") for turn in history), *weights[at:]]
            self.call_texts = {turn + len(history): text for turn, text in self.call_texts.items()}
            self.num_prompt += len(history) * bool(self.num_prompt)
        for name in SYSTEM_COLUMNS:
            if not self.columns.get(name):
                self.used.add(name)
                continue
            system = self._string(name)
            if messages[0]["role"] == "system" and system.strip():
                if messages[0]["content"].strip() == system.strip():
                    continue
                raise self._error(f"'{name}' and the chat's own system turn differ; keep one of them")
            if system.strip():
                messages, weights = [Message(role="system", content=system), *messages], [0.0, *weights]
                self.call_texts = {turn + 1: text for turn, text in self.call_texts.items()}
                self.num_prompt += bool(self.num_prompt)
        return messages, weights

    def _history(self) -> list[Message]:
        """Earlier turns: pairs of question and answer (Alpaca's form), or turns."""
        value = self._parsed("history")
        if not value:
            return []
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise self._error(f"'history' is {kind(value)}, but must be a list of [question, answer] or of turns")
        turns: list[Any] = []
        for item in value:
            if isinstance(item, Mapping):
                turns.append(item)
            elif isinstance(item, Sequence) and len(item) == 2 and all(isinstance(text, str) for text in item):
                turns += [{"role": "user", "content": item[0]}, {"role": "assistant", "content": item[1]}]
            else:
                raise self._error("'history' must be a list of [question, answer] or of turns")
        calls, self.call_texts = self.call_texts, {}
        history, _ = self._chat(turns, "history")
        if self.call_texts:
            raise self._error("'history' holds a function_call: put all turns into one chat")
        self.call_texts = calls
        return history

    def _chat(self, turns: Any, column: str = "prompt") -> tuple[list[Message], list[float]]:
        turns = from_json(turns)
        if isinstance(turns, str) and turns.lstrip().startswith("["):
            raise self._error(
                f"'{column}' is a text that looks like a list, but is not JSON; write the list itself, or json.dumps of it"
            )
        if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
            raise self._error(f"'{column}': a chat must be a list of turns with 'role' and 'content', at least one")
        messages, weights = [], []
        for number, turn in enumerate(turns, start=1):
            if not isinstance(turn, Mapping):
                raise self._error(f"turn {number} is {kind(turn)}, and has no 'content' that is a string")
            message = self._turn(number, turn)
            weight = self._weight(number, turn, message["role"])
            messages.append(message)
            weights.append(weight)
        return messages, weights

    def _turn(self, number: int, turn: Mapping[str, Any]) -> Message:
        names = self.parser.columns
        role_keys = (names["role"],) if "role" in names else ROLE_KEYS
        content_keys = (names["content"],) if "content" in names else CONTENT_KEYS
        role_key = next((key for key in role_keys if key in turn), role_keys[0])
        content_key = next((key for key in content_keys if key in turn), content_keys[0])
        role = self._role(number, role_key, turn.get(role_key))
        calls = self._calls(number, turn)
        reasoning = next((turn[key] for key in REASONING_KEYS if isinstance(turn.get(key), str) and turn[key]), None)
        content = _joined(turn.get(content_key))
        if content is None and turn.get(content_key) is None and (calls or reasoning):
            content = ""
        if content is None:
            if isinstance(turn.get(content_key), list):
                raise self._error(
                    f"turn {number} has parts in '{content_key}' that are not text; a text model learns only text, so remove them"
                )
            raise self._error(f"turn {number} has no '{content_key}' that is a string")
        if role == "function_call":
            role, parsed = "assistant", self._calls_in_text(content)
            if parsed:
                self.call_texts[number - 1] = content
                calls, content = parsed, ""
        message = Message(role=role, content=self._whole(content_key, content))
        if calls:
            message["tool_calls"] = calls
        if reasoning is not None:
            message["reasoning_content"] = self._whole("reasoning_content", reasoning)
        for key in PASSED_KEYS:
            if isinstance(turn.get(key), str):
                message[key] = self._whole(key, turn[key])  # type: ignore[literal-required]
        used = {role_key, content_key, *REASONING_KEYS, *TRAIN_KEYS, "weight", *CALL_KEYS, *PASSED_KEYS}
        self._leave_out(f"{key} of a turn" for key, value in turn.items() if key not in used and _holds(value))
        return message

    def _role(self, number: int, key: str, role: Any) -> str:
        roles = ROLES | dict(self.parser.roles)
        if isinstance(role, str) and (role in roles or role.lower() in roles):
            return roles.get(role) or roles[role.lower()]
        given = f"'{shown(role)}'" if isinstance(role, str) else kind(role)
        raise self._error(
            f"turn {number} has {key} {given}; expected one of {', '.join(roles)}, or give its meaning, as in roles={{bot: assistant}}"
        )

    def _weight(self, number: int, turn: Mapping[str, Any], role: str) -> float:
        weight = turn.get("weight")
        if weight is None:
            weight = 1.0
        elif isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise self._error(f"turn {number} has weight {shown(weight)}; expected a number, 0 or more")
        for key in TRAIN_KEYS:
            if (train := turn.get(key)) is not None:
                if not isinstance(train, bool) and train not in (0, 1):
                    raise self._error(f"turn {number} has {key} {shown(train)}; expected true or false")
                weight = weight if train else 0.0
        if role != "assistant":
            asked = [key for key in (*TRAIN_KEYS, "weight") if turn.get(key)]
            self._leave_out(f"{key} of a {role} turn" for key in asked)
            return 0.0
        return float(weight)

    def _calls(self, number: int, turn: Mapping[str, Any]) -> list[dict[str, Any]]:
        calls = from_json(turn.get("tool_calls")) or []
        single = from_json(turn.get("function_call"))
        if not isinstance(calls, list):
            raise self._error(f"turn {number} has tool_calls that are {kind(calls)}, but must be a list")
        return [self._call(number, call) for call in [*calls, *([single] if single else [])]]

    def _call(self, number: int, call: Any) -> dict[str, Any]:
        """A call as chat templates know it: ``{"type": "function", "function": {"name", "arguments"}}``."""
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise self._error(f"turn {number} has a tool call without a 'name'; expected name and arguments")
        arguments = from_json(function.get("arguments", {}))
        beside = {key: value for key, value in call.items() if key not in ("function", "name", "arguments")}
        return {"type": "function"} | beside | {"function": {**function, "arguments": arguments}}

    def _calls_in_text(self, text: str) -> list[dict[str, Any]]:
        """The calls that a turn of ShareGPT's role ``function_call`` holds; none if it is no JSON of calls."""
        found = from_json(text)
        calls = found if isinstance(found, list) else [found]
        if not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
            return []
        return [self._call(0, call) for call in calls]

    def _tools(self) -> Iterator[Mapping[str, Any]]:
        given = [(column, self._parsed(column)) for column in TOOL_COLUMNS]
        for column, tools in given:
            yield from (
                self._tool(column, tool) for tool in (tools if isinstance(tools, list) else [tools] if tools else [])
            )

    def _tool(self, column: str, tool: Any) -> Mapping[str, Any]:
        tool = from_json(tool)
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise self._error(f"'{column}' must be a list of functions with 'name', 'description' and 'parameters'")
        return {"type": "function", "function": function} if function is tool else tool

    def _check_chat(self, messages: Sequence[Message]) -> None:
        if not any(message["role"] == "assistant" for message in messages):
            raise self._error(
                "the chat has no assistant turn, so there is nothing to learn; add one, or remove the row"
            )
        if messages[0]["role"] == "assistant":
            raise self._error(
                "the chat begins with an assistant turn, which answers nothing; put a user or system turn first"
            )

    # -- columns -----------------------------------------------------------------------------------------------------

    def _take(self, column: str) -> Any:
        self.used.add(column)
        return self.columns.get(column)

    def _string(self, column: str, default: str | None = None) -> str:
        value = self._take(column)
        if value is None and default is not None:
            value = default
        if not isinstance(value, str):
            raise self._error(f"'{column}' is {kind(value)}, but must be a string")
        return self._whole(column, value)

    def _parsed(self, column: str) -> Any:
        """A column that may be written as JSON in a string, as CSV and some tools have it."""
        value = self._take(column)
        if isinstance(value, str) and value.strip():
            parsed = from_json(value)
            if isinstance(parsed, str):
                raise self._error(f"'{column}' is text that is not JSON; fix or remove it")
            return parsed
        return None if isinstance(value, str) else value

    def _object(self, column: str) -> Mapping[str, Any]:
        value = self._parsed(column)
        if value is not None and not isinstance(value, Mapping):
            raise self._error(f"'{column}' is {kind(value)}, but must be an object")
        return value or {}

    def _whole(self, name: str, text: str) -> str:
        """``text``, unless a tokenizer could not take it: JSON may write half of a surrogate pair, UTF-8 may not."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self._error(
                f"'{name}' holds {ascii(text[error.start])[1:-1]}, half of a character, which is not valid text; fix or remove it"
            ) from error
        return text

    def _leave_out(self, names: Any) -> None:
        self.left_out |= dict.fromkeys(names)

    def _unused(self) -> tuple[str, ...]:
        unused = [
            shown(name) or "(no name)"
            for name, value in self.columns.items()
            if name not in self.used and _holds(value)
        ]
        return tuple(dict.fromkeys([*unused, *map(shown, self.left_out)]))

    def _error(self, message: str) -> UserError:
        return UserError(f"{self.row.where}: {message}")

    def _unrecognised(self) -> UserError:
        columns = self.row.columns
        if "chosen" in columns and "rejected" in columns:
            name = "messages" if isinstance(columns["chosen"], list) else "completion"
            return self._error(
                "columns 'chosen' and 'rejected' are for preference training: set task=dpo; to learn only the chosen answers, set "
                f"columns={{{name}: chosen}}"
            )
        names = [shown(name) for name in list(columns)[:MAX_SHOWN]] + ["..."] * (len(columns) > MAX_SHOWN)
        return self._error(f"columns {', '.join(names) or '(none)'} are not recognised; expected {KNOWN_COLUMNS}")


def kind(value: Any) -> str:
    """The type of ``value`` in a message to the user."""
    return "missing or null" if value is None else f"a {type(value).__name__}"


def _holds(value: Any) -> bool:
    """Whether a column or key says anything."""
    return value is not None and value != "" and value != [] and value != {}


def from_json(value: Any) -> Any:
    """``value``; if it is a string that holds a JSON list or object, that."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _joined(content: Any) -> str | None:
    """A turn's content as one text: a string, or OpenAI's list of parts of text; None for anything else."""
    if isinstance(content, list):
        parts = [
            part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
            for part in content
        ]
        types = [part.get("type", "text") for part in content if isinstance(part, Mapping)]
        texts = [part for part in parts if isinstance(part, str)]
        is_text = (
            len(texts) == len(parts) and bool(parts) and all(t in ("text", "input_text", "output_text") for t in types)
        )
        return "".join(texts) if is_text else None
    return content if isinstance(content, str) else None
