"""Every column of a row and every key of a message, in all formats, is used, or named as left out, or refused."""

import pytest

from chat_templates import CHATML, make_tokenizer
from lisatune import UserError
from lisatune.data.formats import COLUMNS, TURN_KEYS, Row, parse_row
from lisatune.data.tokenize import Encoder

SHOWS_ALL = CHATML.replace(
    "m['content']",
    "m['content'] ~ (m.reasoning_content or '') ~ (m.name or '') ~ (m.tool_call_id or '') ~ (m.tool_calls or '') ~ (tools or '')"
    " ~ (kwarg or '')",
)
# columns and keys of the formats of TRL, axolotl, LLaMA-Factory, LMFlow, ms-swift and OpenAI, beside those that are ours
FOREIGN_COLUMNS = (
    "chosen", "rejected", "label", "kto_tag", "images", "videos", "audios", "documents", "objects", "id", "source",
    "conversation_id", "weight", "train", "functions", "parallel_tool_calls", "context", "channel", "solution", "margin",
    "input_ids", "score", "category", "rejected_response", "instances", "type", "prompt_id",
)  # fmt: skip
FOREIGN_KEYS = (
    "refusal", "audio", "annotations", "prefix", "train_detail", "training_detail", "loss_scale", "images", "tool_responses",
    "channel", "cls", "prefill", "assistant_masks", "end_turn", "recipient", "id", "metadata",
)  # fmt: skip
CHATS = {
    "messages": {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    "conversations": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "pair": {"prompt": "Q", "completion": "A"},
    "question": {"question": "Q", "answer": "A"},
    "alpaca": {"instruction": "Q", "input": "", "output": "A"},
    "dolly": {"instruction": "Q", "context": "", "response": "A"},
    "lmflow": {"input": "Q", "output": "A"},
    "swift": {"query": "Q", "response": "A"},
    "text": {"text": "T"},
}
MARK = "sentinel"
VALUES = {
    "history": [[MARK, "x"]],
    "tools": [{"name": MARK}],
    "tool_calls": [{"name": MARK, "arguments": {}}],
    "function_call": {"name": MARK, "arguments": {}},
    "chat_template_kwargs": {"kwarg": MARK},
    "weight": 0,
    "train": False,
    "training": False,
    "loss": False,
}


TOKENIZER = make_tokenizer(SHOWS_ALL)


def played_a_part(columns, name, plain):
    """Whether ``name`` shows in the ids, or changes what is learned, or is named, or the row is refused."""
    encoder = Encoder(TOKENIZER, 10_000)
    try:
        documents = list(encoder([parse_row(Row("here", columns))]))
    except UserError as error:
        return name in str(error)
    text = "".join(TOKENIZER.decode(document.ids) for document in documents)
    named = any(name == left.split(" ")[0] for left in encoder.counts.left_out)
    learned = sum(label != -100 for document in documents for label in document.labels)
    return MARK in text or named or learned < plain


@pytest.mark.parametrize("chat", CHATS)
def test_every_column_is_used_or_named_or_refused(chat):
    for name in {*COLUMNS, *FOREIGN_COLUMNS, "anything"} - CHATS[chat].keys():
        assert played_a_part(CHATS[chat] | {name: VALUES.get(name, MARK)}, name, plain=0), name


@pytest.mark.parametrize("chat", ["messages", "conversations"])
@pytest.mark.parametrize("turn", [0, 1])
def test_every_key_of_a_turn_is_used_or_named_or_refused(chat, turn):
    for name in {*TURN_KEYS, *FOREIGN_KEYS, "anything"} - CHATS[chat][chat][turn].keys():
        turns = [dict(one) for one in CHATS[chat][chat]]
        turns[turn][name] = VALUES.get(name, MARK)
        already_so = turn == 0 and not turns[turn][name]  # a question is not learned anyway
        assert already_so or played_a_part({chat: turns}, name, plain=2), name
