"""What training shows a model is, token for token, what generation shows it later."""

import json
from datetime import date

import pytest

from chat_templates import (
    CHATML,
    DATED,
    FORGETS_THOUGHTS,
    IGNORES_SYSTEM,
    MOVES_SYSTEM,
    NO_END,
    OPENS_THOUGHT,
    SHOWS_REASONING,
    TOOLS,
    make_tokenizer,
    marked,
)
from lisatune import UserError
from lisatune.data.formats import Row, RowParser, parse_row
from lisatune.data.render import CHATML_TEMPLATE, find_template
from lisatune.data.tokenize import Encoder

WEATHER = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}
TWO_TURNS = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Uno."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Dos."},
]
THOUGHTS = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\n4"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "<think>\nagain\n</think>\n\n6"},
]


def encoded(columns, template=CHATML, max_length=1000, tokenizer=None, **options):
    """The row's documents with what is learned in brackets, and what the encoder counted."""
    tokenizer = tokenizer or make_tokenizer(template)
    encoder = Encoder(tokenizer, max_length, **options)
    documents = list(encoder([parse_row(Row("here", columns))]))
    return [short(marked(tokenizer, document)) for document in documents], encoder.counts


def short(text):
    return text.replace("<|im_start|>", "<").replace("<|im_end|>", ">")


SPANISH = "<system\nIn Spanish.>\n<user\nOne?>\n<assistant\n⟦Uno.>⟧"


@pytest.mark.parametrize(
    "columns",
    [
        {
            "system": "In Spanish.",
            "conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "Uno."}],
        },
        {"system_prompt": "In Spanish.", "prompt": "One?", "completion": "Uno."},
        {"system_prompt": "In Spanish.", "question": "One?", "response": "Uno."},
        {"system": "In Spanish.", "messages": TWO_TURNS[:2]},
        {"system": "In Spanish.", "instruction": "One?", "input": "", "output": "Uno.", "history": []},
        {"messages": [{"role": "developer", "content": "In Spanish."}, *TWO_TURNS[:2]]},
        {"system": "In Spanish.", "messages": [{"role": "system", "content": "In Spanish."}, *TWO_TURNS[:2]]},
    ],
)
def test_a_system_prompt_beside_the_chat_is_its_first_turn(columns):
    assert encoded(columns)[0] == [SPANISH]


def test_two_different_system_prompts_are_refused():
    with pytest.raises(UserError, match="^here: 'system' and the chat's own system turn differ"):
        encoded({"system": "A", "messages": [{"role": "system", "content": "B"}, *TWO_TURNS]})


@pytest.mark.parametrize(
    "history",
    [
        [["Zero?", "Cero."]],
        '[["Zero?", "Cero."]]',
        [{"role": "user", "content": "Zero?"}, {"from": "gpt", "value": "Cero."}],
    ],
)
def test_history_comes_before_the_question(history):
    columns = {"system": "S", "instruction": "One?", "input": "", "output": "Uno.", "history": history}
    expected = "<system\nS>\n<user\nZero?>\n<assistant\n⟦Cero.>⟧\n<user\nOne?>\n<assistant\n⟦Uno.>⟧"
    assert encoded(columns)[0] == [expected]


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


@pytest.mark.parametrize("content", ["", "Let me look.", None])
@pytest.mark.parametrize(
    "call",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [{"name": "weather", "arguments": {"city": "Oslo"}}]},
        {"tool_calls": [CALL | {"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]},
        {"function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
    ],
)
@pytest.mark.parametrize(
    "tools", [[{"type": "function", "function": WEATHER}], [WEATHER], json.dumps([WEATHER]), [json.dumps(WEATHER)]]
)
def test_tools_are_shown_and_calls_learned_but_not_their_replies(content, call, tools):
    turns = [
        {"role": "user", "content": "Oslo?"},
        {"role": "assistant", "content": content, **call},
        {"role": "tool", "content": "4 C"},
        {"role": "assistant", "content": "4 degrees."},
    ]
    (text,), counts = encoded({"tools": tools, "messages": turns}, TOOLS)
    assert encoded({"functions": tools, "messages": turns}, TOOLS)[0] == [text]  # as OpenAI had it before
    shown = json.dumps({"type": "function", "function": WEATHER})
    assert text == (
        f"<system\n{shown}>\n<user\nOslo?>\n<assistant\n⟦{content or ''}<call>weather "
        '{"city": "Oslo"}</call>>⟧\n<tool\n4 C>\n<assistant\n⟦4 degrees.>⟧'
    )
    assert not counts.left_out


SHAREGPT_CALL = [
    {"from": "human", "value": "Oslo?"},
    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
    {"from": "observation", "value": "4 C"},
    {"from": "gpt", "value": "4 degrees."},
]


def test_a_call_of_sharegpt_is_a_call_where_the_template_shows_calls_and_text_elsewhere():
    (text,), _ = encoded({"conversations": SHAREGPT_CALL}, TOOLS)
    assert '⟦<call>weather {"city": "Oslo"}</call>>⟧\n<tool\n4 C>' in text
    (text,), _ = encoded({"conversations": SHAREGPT_CALL}, CHATML)
    assert '⟦{"name": "weather", "arguments": {"city": "Oslo"}}>⟧\n<tool\n4 C>\n<assistant\n⟦4 degrees.>⟧' in text
    (text,), _ = encoded({"conversations": SHAREGPT_CALL, "history": [["A?", "B"]], "system": "S"}, CHATML)
    assert '⟦B>⟧\n<user\nOslo?>\n<assistant\n⟦{"name"' in text


def test_a_call_that_the_template_cannot_show_is_refused():
    turns = [TWO_TURNS[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    with pytest.raises(UserError, match="turn 2 calls a tool, but the chat template shows no tool calls"):
        encoded({"messages": turns})


def test_arguments_are_text_for_a_template_that_writes_them_as_they_are():
    template = TOOLS.replace("{{ c.function.arguments | tojson }}", "{{ c.function.name + c.function.arguments }}")
    turns = [TWO_TURNS[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert 'weather{"city": "Oslo"}</call>' in encoded({"messages": turns}, template)[0][0]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (FORGETS_THOUGHTS, "⟦<think>\nthey add up\n</think>\n\n4>⟧"),
        (SHOWS_REASONING, "⟦[they add up]4>⟧"),
        (OPENS_THOUGHT, "<think>\n⟦they add up\n</think>\n\n4>⟧"),
    ],
)
def test_reasoning_is_learned_where_the_template_shows_it(key, template, answer):
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", key: "they add up"}]
    (text,), counts = encoded({"messages": turns}, template)
    assert text == f"<user\n2+2?>\n<assistant\n{answer}"
    assert not counts.left_out


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_may_stand_in_a_column_beside_question_and_answer(key):
    columns = {"problem": "2+2?", key: "two and two", "solution": "4"}
    assert encoded(columns, SHOWS_REASONING)[0] == ["<user\n2+2?>\n<assistant\n⟦[two and two]4>⟧"]


def test_thoughts_that_a_template_drops_are_named_where_the_whole_chat_is_learned():
    _, counts = encoded({"messages": THOUGHTS}, FORGETS_THOUGHTS, completion_only_loss=False)
    assert counts.left_out == {"thoughts of an answer (not shown by the chat template)": 1}
    assert not encoded({"messages": THOUGHTS}, FORGETS_THOUGHTS)[1].left_out


def test_reasoning_that_the_template_does_not_show_is_named():
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", "reasoning_content": "add"}]
    (text,), counts = encoded({"messages": turns}, CHATML)
    assert text.endswith("⟦4>⟧")
    assert counts.left_out == {"reasoning_content (not shown by the chat template)": 1}
    assert "not used: reasoning_content (not shown by the chat template) in 1 row" in counts.describe()


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}, {"weight": 0.0, "train": True}]
)
def test_a_turn_that_is_not_to_be_learned_stays_in_the_context(mark):
    turns = [TWO_TURNS[0], TWO_TURNS[1] | mark, *TWO_TURNS[2:]]
    assert encoded({"messages": turns})[0] == [
        "<user\nOne?>\n<assistant\nUno.>\n<user\nTwo?>\n<assistant\n⟦Dos.>⟧",
    ]
    _, counts = encoded({"messages": [turns[0], TWO_TURNS[1] | mark]})
    assert counts.reasons == {"no turn is to be learned": 1}


def test_answers_in_a_prompt_are_shown_and_not_learned_unless_prompts_are():
    columns = {"system": "S", "prompt": TWO_TURNS[:3], "completion": [TWO_TURNS[3]]}
    context = "<system\nS>\n<user\nOne?>\n<assistant\nUno.>\n<user\nTwo?>\n<assistant\n"
    assert encoded(columns)[0] == [f"{context}⟦Dos.>⟧"]
    assert encoded(columns | {"completion": "Dos."})[0] == [f"{context}⟦Dos.>⟧"]
    assert encoded(columns, loss_on="all")[0] == [f"⟦{context}Dos.>⟧"]
    marked_turn = columns | {"prompt": [TWO_TURNS[0], TWO_TURNS[1] | {"train": True}, TWO_TURNS[2]]}
    assert encoded(marked_turn)[1].left_out == {"train of an answer in the prompt": 1}


def test_a_weight_scales_its_turn():
    turns = [TWO_TURNS[0], TWO_TURNS[1] | {"weight": 0.25}, *TWO_TURNS[2:]]
    (document,) = Encoder(make_tokenizer(), 1000)([parse_row(Row("here", {"messages": turns}))])
    learned = [weight for weight, label in zip(document.weights, document.labels, strict=True) if label != -100]
    assert learned == [0.25] * 5 + [1.0] * 5


@pytest.mark.parametrize("weight", [-1, "1", True, float("nan")])
def test_what_is_no_weight_is_refused(weight):
    with pytest.raises(UserError, match="turn 2 has weight .*expected a number, 0 or more"):
        encoded({"messages": [TWO_TURNS[0], TWO_TURNS[1] | {"weight": weight}]})


def test_a_template_that_forgets_thoughts_gives_a_row_for_each_answer():
    first, second = encoded({"messages": THOUGHTS}, FORGETS_THOUGHTS)[0]
    assert first == "<user\n2+2?>\n<assistant\n⟦<think>\nadd\n</think>\n\n4>⟧"
    assert second == "<user\n2+2?>\n<assistant\n4>\n<user\n3+3?>\n<assistant\n⟦<think>\nagain\n</think>\n\n6>⟧"
    assert len(encoded({"messages": TWO_TURNS}, FORGETS_THOUGHTS)[0]) == 2


def test_answers_to_one_question_share_a_row_where_the_template_keeps_them():
    turns = [TWO_TURNS[0], TWO_TURNS[1], {"role": "tool", "content": "x"}, {"role": "assistant", "content": "Done."}]
    (text,) = encoded({"messages": turns}, FORGETS_THOUGHTS)[0]
    assert text.count("⟦") == 2


def test_a_prompt_that_opens_a_thought_is_shown_as_generation_shows_it():
    (text,) = encoded({"messages": TWO_TURNS[:2]}, OPENS_THOUGHT)[0]
    assert text == "<user\nOne?>\n<assistant\n<think>\n⟦\n</think>\n\nUno.>⟧"
    first, second = encoded({"messages": THOUGHTS}, OPENS_THOUGHT)[0]
    assert first == "<user\n2+2?>\n<assistant\n<think>\n⟦add\n</think>\n\n4>⟧"
    assert second == "<user\n2+2?>\n<assistant\n4>\n<user\n3+3?>\n<assistant\n<think>\n⟦again\n</think>\n\n6>⟧"


def test_a_template_that_moves_the_system_prompt_gives_a_row_for_each_answer():
    texts = encoded({"messages": [{"role": "system", "content": "S"}, *TWO_TURNS]}, MOVES_SYSTEM)[0]
    assert texts == ["[Q]S\n\nOne?[/Q]⟦Uno.</s>⟧", "[Q]One?[/Q]Uno.</s>[Q]S\n\nTwo?[/Q]⟦Dos.</s>⟧"]


@pytest.mark.parametrize("template", [CHATML, FORGETS_THOUGHTS, OPENS_THOUGHT, MOVES_SYSTEM, NO_END, TOOLS, None])
@pytest.mark.parametrize("adds_space", [False, True])
@pytest.mark.parametrize("turns", [TWO_TURNS, THOUGHTS, [{"role": "system", "content": "S"}, *TWO_TURNS]])
def test_every_answer_is_learned_once_after_the_very_prompt_of_generation(template, adds_space, turns):
    tokenizer = make_tokenizer(template, adds_bos=adds_space, adds_space=adds_space)
    documents = list(Encoder(tokenizer, 1000)([parse_row(Row("here", {"messages": turns}))]))
    prompts = []
    for document in documents:
        ids, labels = list(document.ids), list(document.labels)
        prompts += [ids[:t] for t in range(1, len(ids)) if labels[t] != -100 and labels[t - 1] == -100]
    expected = [
        tokenizer.apply_chat_template(turns[:i], add_generation_prompt=True, return_dict=True)["input_ids"]
        for i, turn in enumerate(turns)
        if turn["role"] == "assistant"
    ]
    assert sorted(map(list, prompts)) == sorted(map(list, expected))
    ends = {tokenizer.convert_tokens_to_ids(token) for token in ("</s>", "<|im_end|>")}
    assert all(document.labels[-1] in ends for document in documents)


def test_a_prompt_that_ends_inside_a_token_is_shown_as_generation_tokenizes_it():
    """Here a space belongs to the word after it. So the second prompt, which is tokenized whole, has a token that no piece has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate([*alphabet, "ĠU"])}, merges=[("Ġ", "U")])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'Q: ' + m.content + ' ' if m.role == 'user' else 'A: ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
    )
    documents = list(Encoder(tokenizer, 100)([parse_row(Row("here", {"messages": TWO_TURNS}))]))
    assert [marked(tokenizer, document) for document in documents] == [
        "Q: One? A: ⟦Uno.</s>⟧",
        "Q: One? A: Uno.</s>Q: Two? A: ⟦Dos.</s>⟧",
    ]
    for document, turns in zip(documents, (TWO_TURNS[:1], TWO_TURNS[:3]), strict=True):
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert list(document.ids)[: len(prompt)] == prompt
        assert document.labels[len(prompt)] != -100
    (text,), _ = encoded({"messages": TWO_TURNS}, tokenizer=tokenizer, loss_on="all")
    assert text.count("⟦") == 1


@pytest.mark.parametrize("option", [{"completion_only_loss": False}, {"loss_on": "all"}])
def test_all_is_learned_on_request_though_answers_cannot_be_told_apart(option):
    (text,) = encoded({"messages": TWO_TURNS}, FORGETS_THOUGHTS, **option)[0]
    assert text == "⟦<user\nOne?>\n<assistant\nUno.>\n<user\nTwo?>\n<assistant\n<think>\n\n</think>\n\nDos.>⟧"
    (text,) = encoded({"messages": TWO_TURNS}, CHATML, **option)[0]
    assert text == "⟦<user\nOne?>\n<assistant\nUno.>\n<user\nTwo?>\n<assistant\nDos.>⟧"
    with pytest.raises(UserError, match="weights of turns do not work with"):
        encoded(
            {"messages": [TWO_TURNS[0], TWO_TURNS[1] | {"weight": 0.5}, *TWO_TURNS[2:]]}, FORGETS_THOUGHTS, **option
        )


def test_the_last_answer_alone_is_learned_on_request():
    (text,) = encoded({"messages": TWO_TURNS}, loss_on="last")[0]
    assert text == "<user\nOne?>\n<assistant\nUno.>\n<user\nTwo?>\n<assistant\n⟦Dos.>⟧"


def test_a_template_without_an_end_is_given_one():
    texts, counts = encoded({"messages": TWO_TURNS}, NO_END)
    assert texts == [
        "user: One?\nassistant: ⟦Uno.</s>⟧",
        "user: One?\nassistant: Uno.\nuser: Two?\nassistant: ⟦Dos.</s>⟧",
    ]
    assert list(counts.ends) == [257]
    (text,) = encoded({"prompt": "Poem?", "completion": "a\nb\n\n"}, NO_END)[0]
    assert text == "user: Poem?\nassistant: ⟦a\nb\n\n</s>⟧"


def test_an_empty_answer_inside_a_chat_keeps_its_end_and_is_not_learned():
    turns = [TWO_TURNS[0], {"role": "assistant", "content": ""}, *TWO_TURNS[2:]]
    assert encoded({"messages": turns})[0] == ["<user\nOne?>\n<assistant\n>\n<user\nTwo?>\n<assistant\n⟦Dos.>⟧"]
    assert encoded({"prompt": "a", "completion": " \n"})[1].reasons == {"the answer is empty": 1}


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("text", ["", " \n", "<s>", "<s></s>"])
def test_a_blank_text_is_left_out_and_counted(text, adds_bos):
    texts, counts = encoded({"text": text}, tokenizer=make_tokenizer(adds_bos=adds_bos))
    assert (texts, counts.reasons, counts.refused) == ([], {"blank text": 1}, 1)


@pytest.mark.parametrize("text", ["Hi", "<s>Hi", "<s>Hi</s>", "Hi</s>\n"])
def test_text_begins_and_ends_once(text):
    assert encoded({"text": text}, tokenizer=make_tokenizer(adds_bos=True))[0] == ["⟦<s>Hi</s>⟧"]


def test_text_alone_leaves_the_tokenizer_without_a_template():
    tokenizer = make_tokenizer(None)
    encoded({"text": "Hi"}, tokenizer=tokenizer)
    assert tokenizer.chat_template is None
    encoded({"messages": TWO_TURNS}, tokenizer=tokenizer)
    assert tokenizer.chat_template is not None


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_template_of_ours_begins_as_text_does(adds_bos):
    tokenizer = make_tokenizer(None, adds_bos=adds_bos)
    for name in ("chatml", "plain"):
        tokenizer.chat_template = find_template(name, tokenizer)
        (text,), _ = encoded({"messages": TWO_TURNS[:2]}, tokenizer=tokenizer)
        assert text.startswith("<s>") == adds_bos
    assert find_template("chatml", tokenizer).endswith(CHATML_TEMPLATE)


def test_a_chat_in_the_plain_template_begins_as_text_does():
    columns = {"messages": TWO_TURNS[:2]}
    assert encoded(columns, tokenizer=make_tokenizer(None))[0][0].startswith("### User:")
    assert encoded(columns, tokenizer=make_tokenizer(None, adds_bos=True))[0][0].startswith("<s>### User:")


def test_a_tokenizer_that_begins_texts_with_a_space_puts_none_before_an_answer():
    tokenizer = make_tokenizer(None, adds_bos=True, adds_space=True)
    (text,) = encoded({"messages": TWO_TURNS}, tokenizer=tokenizer)[0]
    assert "### Assistant:\n⟦Uno.</s>⟧" in text
    assert "### Assistant:\n⟦Dos.</s>⟧" in text


def test_a_date_that_the_template_writes_can_be_kept():
    (text,) = encoded({"messages": TWO_TURNS[:2]}, DATED, today=date(2020, 2, 3))[0]
    assert text == "It is 2020-02-03\n<user\nOne?>\n<assistant\n⟦Uno.>⟧"


def test_what_a_template_does_not_show_is_named():
    turns = [{"role": "system", "content": "Be kind."}, *TWO_TURNS]
    (text,), counts = encoded({"messages": turns, "tools": [WEATHER], "source": "web"}, IGNORES_SYSTEM)
    assert "kind" not in text
    expected = {"system turns (not shown by the chat template)", "tools (not shown by the chat template)", "source"}
    assert set(counts.left_out) == expected


@pytest.mark.parametrize(("too_long", "reasons"), [("truncate", {}), ("drop", {"longer than max_length": 1})])
def test_a_chat_that_is_too_long_is_cut_or_dropped_and_counted(too_long, reasons):
    columns = {"prompt": "a", "completion": "b" * 50}
    texts, counts = encoded(columns, max_length=30, too_long=too_long)
    assert (len(texts), counts.truncated, counts.reasons) == (not reasons, not reasons, reasons)
    with pytest.raises(UserError, match=r"^here: has \d+ tokens, more than max_length=30"):
        encoded(columns, max_length=30, too_long="refuse")


def test_a_token_without_an_embedding_harms_only_the_row_that_has_it():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"])
    options = {"tokenizer": tokenizer, "num_embeddings": 260}
    assert len(encoded({"prompt": "a", "completion": "b"}, **options)[0]) == 1
    with pytest.raises(UserError, match="^here: holds the token '<image>' .260., but the model has embeddings for 260"):
        encoded({"prompt": "<image>", "completion": "b"}, **options)
    _, counts = encoded({"prompt": "<image>", "completion": "b"}, on_bad_row="skip", **options)
    assert counts.reasons == {"a bad row": 1}
    assert "<image>" in counts.describe()


@pytest.mark.parametrize(
    "content", [[{"type": "text", "text": "One?"}], ["One?"], [{"type": "text", "text": "On"}, {"text": "e?"}]]
)
def test_content_may_be_parts_of_text(content):
    assert encoded({"messages": [{"role": "user", "content": content}, TWO_TURNS[1]]})[0] == [
        "<user\nOne?>\n<assistant\n⟦Uno.>⟧"
    ]
    with pytest.raises(UserError, match="turn 1 has parts in 'content' that are not text"):
        encoded({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, TWO_TURNS[1]]})


def test_other_names_are_given_by_the_settings():
    parser = RowParser({"messages": "dialog", "role": "who", "content": "says"}, {"bot9": "assistant", "me": "user"})
    row = Row("here", {"dialog": [{"who": "me", "says": "One?"}, {"who": "bot9", "says": "Uno."}], "id": 7})
    example = parser(row)
    assert [turn["role"] for turn in example.messages] == ["user", "assistant"]
    assert example.left_out == ("id",)
    assert (
        RowParser({"prompt": "q", "completion": "a"})(Row("here", {"q": "One?", "a": "Uno."})).messages[0]["content"]
        == "One?"
    )
    both = RowParser({"messages": "dialog"})(Row("here", {"messages": TWO_TURNS, "dialog": TWO_TURNS[:2]}))
    assert both.messages == tuple(TWO_TURNS[:2])
    assert both.left_out == ("messages (dialog stands for it)",)
    missing = RowParser({"messages": "dialog"})(Row("here", {"messages": TWO_TURNS}))
    assert missing.left_out == ("dialog (which columns asks for) is not there",)
    with pytest.raises(UserError, match="columns: 'mesages' is not one of .*did you mean 'messages'"):
        RowParser({"mesages": "dialog"})
    with pytest.raises(UserError, match="roles: bot cannot be 'asistant'; choose one of"):
        RowParser({}, {"bot": "asistant"})
