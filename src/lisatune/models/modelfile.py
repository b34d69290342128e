"""An Ollama Modelfile: a model's chat template in the language of Ollama's, and its stop tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lisatune.data.render import writes_date
from lisatune.models.load import end_tokens

MARK = "\u2060{}\u2060"  # word joiners, which no template strips
NO_TEMPLATE = (
    "# The chat template cannot be written in Ollama's template language. Ollama then looks for one that it knows in the\n"
    "# .gguf file. Compare its answers with those of `lisatune chat`.\n"
)


@dataclass(frozen=True)
class Pieces:
    """A chat template as text around each message.

    Attributes:
        around: For each role, what stands before and after a message.
        answer: What begins an answer.
        alone: What stands first where there is no system prompt.
    """

    around: dict[str, tuple[str, str]]
    answer: str
    alone: str

    def render(self, messages: list[dict[str, str]]) -> str:
        """A chat, ready to be answered.

        Example:
            >>> Pieces({"user": ("U:", ";")}, "A:", "").render([{"role": "user", "content": "Hi"}])
            'U:Hi;A:'
        """
        begin = "" if any(message["role"] == "system" for message in messages) else self.alone
        said = (self.around[m["role"]][0] + m["content"] + self.around[m["role"]][1] for m in messages)
        return begin + "".join(said) + self.answer

    def in_go(self) -> str:
        """The same in Go's template language, which Ollama reads."""
        parts = [f"{{{{ if not .System }}}}{_go(self.alone)}{{{{ end }}}}"] if self.alone else []
        parts.append("{{ range .Messages }}")
        for number, (role, (before, after)) in enumerate(self.around.items()):
            word = "else if" if number else "if"
            parts.append(f'{{{{ {word} eq .Role "{role}" }}}}{_go(before)}{{{{ .Content }}}}{_go(after)}')
        return "".join([*parts, "{{ end }}{{ end }}", _go(self.answer)])


def modelfile(folder: Path, file: str) -> str:
    """The Modelfile for ``file``, made from the model in ``folder``."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    lines = [f"FROM ./{file}\n"]
    if tokenizer.chat_template is not None:
        pieces = pieces_of(tokenizer)
        lines.append(NO_TEMPLATE if pieces is None else f'TEMPLATE """{pieces.in_go()}"""\n')
    settings = folder / "generation_config.json"
    config = GenerationConfig.from_pretrained(folder) if settings.is_file() else GenerationConfig()
    holder = type("Holder", (), {"generation_config": config})
    ends = dict.fromkeys(tokenizer.decode([token]) for token in end_tokens(holder, tokenizer))
    lines += [f'PARAMETER stop "{end}"\n' for end in ends if end and '"' not in end and "\n" not in end]
    return "".join(lines)


def pieces_of(tokenizer: Any) -> Pieces | None:
    """The tokenizer's chat template in pieces; None if chats of up to five messages do not come out of them to the letter."""

    def render(messages: list[dict[str, str]], answer: bool = True) -> str:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))
        return text.removeprefix(tokenizer.bos_token or "")  # llama.cpp puts that in front itself

    def said(role: str, number: int) -> dict[str, str]:
        return {"role": role, "content": MARK.format(number)}

    if writes_date(tokenizer.chat_template):  # today's would stay there for ever
        return None
    try:
        one, two, three = said("user", 1), said("assistant", 2), said("user", 3)
        alone, begin = render([one]), render([one], answer=False)
        answer = alone.removeprefix(begin)
        first, _, rest = render([one, two, three], answer=False).partition(one["content"])
        middle, _, end = rest.partition(three["content"])
        before_answer, _, between = middle.partition(two["content"])
        with_system = render([said("system", 0), one])
        before_system, _, rest = with_system.partition(said("system", 0)["content"])
        after_system = rest.partition(one["content"])[0]
        found = _pieces(first, end, before_answer, between, before_system, after_system, answer)
        chats = [
            [one],
            [one, two, three],
            [said("system", 0), one],
            [said("system", 0), one, two, three, said("assistant", 4), said("user", 5)],
        ]
        if found is None or any(found.render(chat) != render(chat) for chat in chats):
            return None
    except Exception:  # a template may refuse a role, or fail in any way; jinja has no common base for that
        return None
    return None if '"""' in found.in_go() else found


def _pieces(
    first: str, end: str, before_answer: str, between: str, before_system: str, after_system: str, answer: str
) -> Pieces | None:
    """Cut what stands between messages where one ends and the next begins; ``end`` is what follows a last question."""
    if not before_answer.startswith(end):
        return None
    # what stands before a question is what `first` and `between` both end with; an answer most likely ends as a question does
    tails = [between.removeprefix(end), *(between[start:] for start in range(len(between) + 1))]
    question = next(tail for tail in tails if first.endswith(tail))
    if not after_system.endswith(question):
        return None
    around = {
        "system": (before_system, after_system.removesuffix(question)),
        "user": (question, end),
        "assistant": (before_answer.removeprefix(end), between.removesuffix(question)),
    }
    return Pieces(around, answer, first.removesuffix(question))


def _go(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')
