import pytest

from lisatune import UserError
from lisatune.data.formats import Example
from lisatune.data.tokenize import IGNORED, Encoder

CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)


def chat(*contents, where="here"):
    roles = ["user", "assistant"] * len(contents)
    return Example(where, tuple({"role": r, "content": c} for r, c in zip(roles, contents, strict=False)))


@pytest.fixture
def encoder(tokenizer):
    tokenizer.chat_template = CHATML
    return Encoder(tokenizer, 100)


def learned(tokenizer, encoded):
    return tokenizer.decode([label for label in encoded.labels if label != IGNORED])


def test_loss_is_on_the_answers_and_their_end_alone(encoder, tokenizer):
    (encoded,) = encoder([chat("Hi", "Hello", "Bye", "See you")])
    assert learned(tokenizer, encoded) == "Hello</s>See you</s>"
    assert (
        tokenizer.decode(encoded.ids)
        == "<s>user:Hi</s>\n<s>assistant:Hello</s>\n<s>user:Bye</s>\n<s>assistant:See you</s>"
    )
    assert all(label in (IGNORED, token) for token, label in zip(encoded.ids, encoded.labels, strict=True))


def test_prompt_ids_are_those_of_generation(encoder, tokenizer):
    (encoded,) = encoder([chat("Hi", "Hello")])
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=True
    )
    prompt = asked["input_ids"]
    assert list(encoded.ids[: len(prompt)]) == list(prompt)
    assert encoded.labels[len(prompt) - 1] == IGNORED != encoded.labels[len(prompt)]


def test_backend_alone_gives_the_ids_of_the_tokenizer(encoder, tokenizer):
    """The fast way against the plain one, after somebody has asked for padding and a limit."""
    texts = ["", "Hi", "<s>user:Hi</s>\n", "</s> é 漢字 \n", "a much longer text than all others"]
    for special in (False, True):
        plain = tokenizer(texts, add_special_tokens=special)["input_ids"]
        tokenizer(texts, padding=True, truncation=True, max_length=3)
        assert encoder._backend is not None
        assert encoder._tokenize(texts, special=special) == plain


def test_tokenizer_with_a_way_of_its_own_is_asked_itself(tokenizer):
    class Own(type(tokenizer)):
        def _encode_plus(self, *args, **options):
            return {"input_ids": [[7, 7], [7, 7], [7, 7]]}

    own = Encoder(Own(tokenizer_object=tokenizer.backend_tokenizer), 100)
    assert own._tokenize(["a", "b", "c"]) == [[7, 7], [7, 7], [7, 7]]


def test_prompts_can_be_learned_too(tokenizer):
    tokenizer.chat_template = CHATML
    (encoded,) = Encoder(tokenizer, 100, completion_only_loss=False)([chat("Hi", "Hello")])
    assert encoded.labels == encoded.ids


def test_text_is_learned_whole_and_split(tokenizer):
    encoder = Encoder(tokenizer, 4)
    documents = list(encoder([Example("here", text="abcdefghi")]))
    assert "".join(tokenizer.decode(d.ids) for d in documents) == "abcdefghi</s>"
    assert [len(d) for d in documents] == [4, 4, 2]
    assert all(d.labels == d.ids for d in documents)
    assert (encoder.counts.read, encoder.counts.used, encoder.counts.tokens) == (1, 1, 10)


def test_nothing_is_dropped_in_silence(tokenizer):
    tokenizer.chat_template = CHATML
    encoder = Encoder(tokenizer, 30)
    rows = [chat("Hi", "Hello"), chat("x" * 40, "lost"), chat("Hi", ""), chat("Hi", "y" * 40), Example("here", text="")]
    assert len(list(encoder(rows))) == 2
    counts = encoder.counts
    assert (counts.read, counts.used, counts.refused, counts.truncated) == (5, 2, 3, 1)
    assert "3 refused" in counts.describe()
    assert "1 rows cut at max_length" in counts.describe()


def test_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="^row 9: the chat template rewrites earlier turns"):
        list(Encoder(tokenizer, 50)([chat("Hi", "Hello", "Bye", "Ciao", where="row 9")]))


def test_template_that_refuses_names_the_row(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system prompt here') }}"
    with pytest.raises(UserError, match="^row 9: the chat template refuses this chat .no system prompt here"):
        list(Encoder(tokenizer, 50)([chat("Hi", "Hello", where="row 9")]))


def test_tokenizer_without_a_template_gets_a_plain_one(tokenizer):
    tokenizer.chat_template = None
    (encoded,) = Encoder(tokenizer, 100)([chat("Hi", "Hello")])
    assert tokenizer.decode(encoded.ids) == "### User:\nHi\n\n### Assistant:\nHello</s>"
    assert learned(tokenizer, encoded) == "Hello</s>"
