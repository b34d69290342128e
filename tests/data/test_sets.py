"""The sets in examples/ are whole, and what they teach comes back in `lisatune chat`."""

import json
from datetime import date as Date
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from chat_templates import make_tokenizer
from lisatune.data.formats import parse_row, read_rows
from lisatune.data.render import CHATML_TEMPLATE
from lisatune.data.tokenize import IGNORED, Encoder
from tiny import make_llama

EXAMPLES = Path(__file__).parents[2] / "examples"


def weekday(date):
    return Date.fromisoformat(date).strftime("%A")


def test_every_call_of_the_tools_set_has_its_right_reply():
    metres = {"m": 1, "km": 1000, "cm": 0.01, "mi": 1609.344}
    right = {
        "convert_length": lambda value, from_unit, to_unit: (
            f"{round(value * metres[from_unit] / metres[to_unit], 3):g}"
        ),
        "days_between": lambda start, end: str((Date.fromisoformat(end) - Date.fromisoformat(start)).days),
        "weekday": weekday,
    }
    num_calls = 0
    for row in read_rows(str(EXAMPLES / "tools.jsonl")):
        turns = row.columns["messages"]
        known = {tool["function"]["name"] for tool in row.columns["tools"]}
        for turn, reply in pairwise(turns):
            for call in turn.get("tool_calls", ()):
                assert call["function"]["name"] in known
                assert reply["content"] == right[call["function"]["name"]](**call["function"]["arguments"])
                assert reply["content"] in turns[-1]["content"]
                num_calls += 1
    assert num_calls > 20


def test_calls_and_answers_of_the_sets_are_learned_and_nothing_else():
    tokenizer = make_tokenizer(CHATML_TEMPLATE)
    for name in ("tools.jsonl", "multi_turn.jsonl"):
        encoder = Encoder(tokenizer, 4000)
        examples = [parse_row(row) for row in read_rows(str(EXAMPLES / name))]
        for example, document in zip(examples, encoder(examples), strict=True):
            learned = tokenizer.decode([label for label in document.labels if label != IGNORED])
            answers = [turn for turn in example.messages if turn["role"] == "assistant"]
            assert learned.count("<|im_end|>") == len(answers)
            for turn in answers:
                assert turn["content"] in learned
                for call in turn.get("tool_calls", ()):
                    assert json.dumps(call["function"]["arguments"]) in learned
            assert not any(turn["content"] in learned for turn in example.messages if turn["role"] == "user")
        assert not encoder.counts.left_out or set(encoder.counts.left_out) <= {"name (not shown by the chat template)"}


def words_tokenizer(path):
    """Frequent words of ``path`` as tokens, digits one by one: a row of the sets then takes some hundred tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator([path.read_text(encoding="utf-8")], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tools.jsonl", "multi_turn.jsonl"])
def test_a_model_that_learned_a_set_by_heart_says_it_in_chat(name, tmp_path):
    """Four rows, learned by a tiny model until it knows them; every answer and call comes back to the letter."""
    from lisatune.models.chat import Chat
    from lisatune.models.load import load_trained
    from lisatune.settings import build_config
    from lisatune.train import train

    tokenizer = words_tokenizer(EXAMPLES / name)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 2048}
    make_llama(vocab_size=len(tokenizer), **sizes).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    lines = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()[8:12]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    train(
        build_config(
            {
                "model": str(tmp_path / "m"), "data": str(tmp_path / "rows.jsonl"), "output": str(tmp_path / "run"),
                "method": "full", "max_steps": 200, "learning_rate": 5e-3, "max_length": 2048, "chat_template": "chatml",
                "lr_scheduler_type": "cosine", "warmup_steps": 10, "device": "cpu",
            }
        )
    )  # fmt: skip
    model, tokenizer = load_trained(str(tmp_path / "run"))
    for line in lines:
        row = json.loads(line)
        chat = Chat(model, tokenizer, tools=row.get("tools"), max_new_tokens=100)
        for turn, reply in pairwise(row["messages"]):
            if reply["role"] != "assistant":
                continue
            said = chat.ask(turn["content"], role=turn["role"])
            if calls := reply.get("tool_calls"):
                call = json.loads(said.removeprefix("<tool_call>").removesuffix("</tool_call>"))
                assert call == {key: calls[0]["function"][key] for key in ("name", "arguments")}
            else:
                assert said == reply["content"]
