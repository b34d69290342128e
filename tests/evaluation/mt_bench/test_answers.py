"""Tiny random models; greedy answers in float32."""

import shutil

import pytest

from lisatune.data.tokenize import PLAIN_TEMPLATE
from lisatune.errors import UserError
from lisatune.evaluation.mt_bench import answers as module
from lisatune.evaluation.mt_bench.answers import Answerer, batches_of, digest_of, end_tokens, generate, render
from lisatune.evaluation.mt_bench.questions import Question
from lisatune.evaluation.mt_bench.records import Records
from tiny import make_llama, make_tokenizer

QUESTIONS = [Question(str(i), "maths", ("Hi! " * i, f"And {i}?")) for i in range(1, 6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with room for two turns."""
    folder = tmp_path_factory.mktemp("answers")
    make_llama(layers=2, vocab_size=len(make_tokenizer()), max_position_embeddings=512).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def answerer(folder, memory_path):
    def make(name=folder, **settings):
        records = Records(memory_path / "answers.jsonl")
        return Answerer(str(name), records, device="cpu", **{"max_new_tokens": 12, "batch_size": 3} | settings)

    return make


def one_by_one(folder, max_new_tokens):
    """The slow, clear equal: no batch, no padding, no records."""
    from lisatune.models.load import load_model

    model, tokenizer = load_model(str(folder))
    tokenizer.chat_template = PLAIN_TEMPLATE
    for question in QUESTIONS:
        chat = []
        for turn in question.turns:
            chat.append({"role": "user", "content": turn})
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            out = model.generate(**ids, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
            text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            chat.append({"role": "assistant", "content": text})
        yield tuple(message["content"] for message in chat[1::2])


def test_batches_answer_as_one_by_one(answerer, folder):
    came = []
    made = answerer().answers(QUESTIONS, came.append)
    assert [a.texts for a in made] == list(one_by_one(folder, 12))
    assert sum(came) == 10
    assert len({a.texts for a in made}) > 1  # else the test would see no mixing up


def test_nothing_is_made_twice_and_the_model_is_not_even_loaded(answerer, monkeypatch):
    made = answerer().answers(QUESTIONS)
    assert answerer().num_missing(QUESTIONS) == 0
    monkeypatch.setattr(module, "load_model", None)
    assert answerer(batch_size=1).answers(QUESTIONS) == made


def test_a_stop_in_the_middle_loses_one_batch_at_most(answerer, monkeypatch):
    calls = []

    def stops(*words):
        calls.append(len(words[2]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*words)

    monkeypatch.setattr(module, "generate", stops)
    with pytest.raises(KeyboardInterrupt):
        answerer().answers(QUESTIONS)
    assert answerer().num_missing(QUESTIONS) == 2
    made = answerer().answers(QUESTIONS)
    assert calls == [3, 2, 2, 3, 2]  # the batch that was lost, then the second turns
    fresh = Answerer(
        answerer().name, Records(answerer().records.path.with_name("fresh")), max_new_tokens=12, device="cpu"
    )
    assert made == fresh.answers(QUESTIONS)


def test_another_limit_or_model_is_another_answer(answerer, folder, tmp_path):
    answerer().answers(QUESTIONS[:1])
    assert answerer(max_new_tokens=5).num_missing(QUESTIONS[:1]) == 1
    shutil.copytree(folder, tmp_path / "copy")
    assert answerer(tmp_path / "copy").num_missing(QUESTIONS[:1]) == 0  # the same model elsewhere
    make_llama(layers=2, vocab_size=len(make_tokenizer()), seed=1).save_pretrained(tmp_path / "copy")
    assert answerer(tmp_path / "copy").num_missing(QUESTIONS[:1]) == 1


def test_a_cut_answer_is_counted(answerer):
    assert [a.num_cut for a in answerer().answers(QUESTIONS)] == [2] * 5
    record = answerer().records.get(answerer()._key([{"role": "user", "content": QUESTIONS[0].turns[0]}]))
    assert (record["num_tokens"], record["cut"], record["turn"], record["question_id"]) == (12, True, 1, "1")


def test_a_conversation_that_fills_the_context(answerer, folder, tmp_path):
    """Beyond the positions that the model has nothing is generated, and other questions do not suffer from it."""
    shutil.copytree(folder, tmp_path / "short")
    make_llama(layers=2, vocab_size=len(make_tokenizer()), max_position_embeddings=90).save_pretrained(
        tmp_path / "short"
    )
    questions = [
        *QUESTIONS[:2],
        Question("long", "maths", ("x" * 55, "y" * 20)),
        Question("longer", "maths", ("x" * 90, "y")),
    ]
    made = answerer(tmp_path / "short").answers(questions)
    short = Records(answerer().records.path)
    tokens = [
        short.get(answerer(tmp_path / "short")._key([{"role": "user", "content": q.turns[0]}]))["num_tokens"]
        for q in questions
    ]
    assert tokens[:2] == [12, 12]
    assert 0 < tokens[2] < 12
    assert tokens[3] == 0
    assert made[3].texts == ("", "")
    assert (made[2].num_cut, made[3].num_cut) == (2, 2)


def test_an_answer_ends_where_the_model_ends_it(folder):
    """At each of the ends that model and tokenizer name, not at the batch's; what comes after is padding."""
    from lisatune.models.load import load_model

    model, tokenizer = load_model(str(folder))
    tokenizer.chat_template = PLAIN_TEMPLATE
    prompts = [render(tokenizer, [{"role": "user", "content": q.turns[0]}]) for q in QUESTIONS]
    whole = generate(model, tokenizer, prompts, 12)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text, _, _ in whole]
    model.generation_config.eos_token_id = [2, ids[0][3]]
    assert end_tokens(model, tokenizer) == sorted({2, ids[0][3]})
    ended = generate(model, tokenizer, prompts, 12)
    first = ids[0].index(ids[0][3])
    assert ended[0] == (tokenizer.decode(ids[0][:first]).strip(), first, False)
    assert ended[1:] != [(t, n, False) for t, n, _ in whole[1:]]


def test_prompts_with_little_room_go_alone():
    assert list(batches_of([5, 90, 4, 6, 5], [8, 8, 8, 2, 7], 8, 2)) == [[2, 0], [1], [3], [4]]


def test_the_digest_sees_weights_and_template_and_nothing_else(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("words")
    assert digest_of(str(tmp_path / "copy")) == digest_of(str(folder))
    (tmp_path / "copy" / "chat_template.jinja").write_text("{{ messages }}")
    assert digest_of(str(tmp_path / "copy")) != digest_of(str(folder))


def test_a_hub_name_that_is_not_there():
    with pytest.raises(UserError, match="nobody/nothing: no config.json of a model can be read"):
        digest_of("nobody/nothing")


def test_a_template_that_refuses_the_chat(folder):
    from lisatune.models.load import load_model

    _, tokenizer = load_model(str(folder))
    tokenizer.chat_template = "{{ raise_exception('one turn only') }}"
    with pytest.raises(UserError, match="refuses a conversation of two turns .*one turn only"):
        render(tokenizer, [{"role": "user", "content": "a"}])
