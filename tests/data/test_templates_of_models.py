"""The chat templates of some thirty model families, as TRL ships them, with chats, thoughts and tool calls."""

import importlib.util
import re
from pathlib import Path

import pytest

from chat_templates import make_tokenizer, marked
from lisatune import UserError
from lisatune.data.formats import Row, parse_row
from lisatune.data.tokenize import Encoder

_spec = importlib.util.find_spec("trl")
FOLDER = Path(_spec.submodule_search_locations[0]) / "chat_templates" if _spec else Path("none")
OF_IMAGES = ("vl", "vlm", "llava", "idefics")
NAMES = sorted(
    path.stem
    for path in FOLDER.glob("*.jinja")
    if not path.stem.endswith("_training") and not any(word in path.stem for word in OF_IMAGES)
)
MARKS = re.compile(
    r"<[|｜][^|｜\s]{1,40}[|｜]>|<(?:bos|eos|start_of_turn|end_of_turn|turn\||\|turn|tool_call\||\|tool_response)>"
)
WEATHER = {
    "name": "weather",
    "description": "The weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "Where."}},
        "required": ["city"],
    },
}
CHAT = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Uno."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Dos."},
]
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CHATS = {
    "chat": {"messages": CHAT},
    "thoughts": {"messages": [CHAT[0], CHAT[1] | {"reasoning_content": "FIRST"}, CHAT[2], CHAT[3] | {"reasoning_content": "SECOND"}]},
    "calls": {
        "tools": [{"type": "function", "function": WEATHER}],
        "messages": [
            {"role": "user", "content": "Weather in Oslo?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "4 C"},
            {"role": "assistant", "content": "It is cold."},
        ],
    },
}  # fmt: skip


def learned_of(name, chat):
    """What is learned in each row, what is in front of it, and what is named as left out."""
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = make_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(MARKS.findall(template)))})
    encoder = Encoder(tokenizer, 20_000)
    documents = list(encoder([parse_row(Row("here", CHATS[chat]))]))
    spans = [
        (before, learned)
        for document in documents
        for before, learned in re.findall("([^⟦⟧]*)⟦([^⟧]*)⟧", marked(tokenizer, document))
    ]
    return spans, set(encoder.counts.left_out)


@pytest.mark.skipif(not NAMES, reason="needs trl")
@pytest.mark.parametrize("name", NAMES)
def test_answers_thoughts_and_calls_are_learned_or_named_or_refused(name):
    spans, left_out = learned_of(name, "chat")
    assert ["Uno." in learned for _, learned in spans] == [True, False]
    assert "Dos." in spans[1][1]
    assert not any(question in learned for _, learned in spans for question in ("One?", "Two?"))
    assert not left_out
    ends = {learned[learned.index(answer) + 4 :] for (_, learned), answer in zip(spans, ("Uno.", "Dos."), strict=True)}
    assert len(ends) == 1, ends  # every answer ends in the same way
    assert "\n" not in ends.pop()

    spans, left_out = learned_of(name, "thoughts")
    assert ["Uno." in learned for _, learned in spans] == [True, False]
    shown = all(thought in learned for (_, learned), thought in zip(spans, ("FIRST", "SECOND"), strict=True))
    assert left_out == (set() if shown else {"reasoning_content (not shown by the chat template)"})

    if "tool_calls" not in (FOLDER / f"{name}.jinja").read_text() or name == "deepseek_r1_distill":
        with pytest.raises(UserError, match="shows no tool calls|does not show all tool calls"):
            learned_of(name, "calls")
        return
    spans, left_out = learned_of(name, "calls")
    (_, call), (reply, answer) = spans
    assert "weather" in call
    assert "Oslo" in call
    assert "4 C" in reply
    assert "It is cold." in answer
    assert not left_out & {"tools (not shown by the chat template)", "tool_calls (not shown by the chat template)"}


@pytest.mark.skipif(not NAMES, reason="needs trl")
@pytest.mark.parametrize("name", ["deepseekv3", "gptoss", "nemotron_3_nano", "phi3", "qwen3_5_nothink"])
def test_templates_with_habits_of_their_own(name):
    expected = {
        "deepseekv3": ("calls", "\n</think>\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"),
        "gptoss": ("thoughts", "<|channel|>analysis<|message|>FIRST<|end|><|start|>assistant<|channel|>final<|message|>Uno.<|return|>"),
        "nemotron_3_nano": ("chat", "</think>Uno.<|im_end|>"),
        "phi3": ("chat", "Uno.<|end|>"),
        "qwen3_5_nothink": ("thoughts", "Uno.<|im_end|>"),
    }  # fmt: skip
    chat, begins = expected[name]
    assert learned_of(name, chat)[0][0][1].startswith(begins)
