"""The Modelfile for Ollama: a chat template in the language of another program."""

import pytest

import chat_templates
from chat_templates import CHATML, DATED, FORGETS_THOUGHTS, IGNORES_SYSTEM, MOVES_SYSTEM, NO_END, OPENS_THOUGHT, TOOLS
from lisatune.models.modelfile import NO_TEMPLATE, modelfile, pieces_of
from tiny import make_llama

SMOLLM2 = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}" + CHATML
CHATS = [
    ["user"], ["system", "user"], ["user", "assistant", "user"], ["system", "user", "assistant", "user"],
    ["system", *["user", "assistant"] * 3, "user"],
]  # fmt: skip


@pytest.mark.parametrize(
    "template", [CHATML, SMOLLM2, NO_END, TOOLS, OPENS_THOUGHT, FORGETS_THOUGHTS, "{{ bos_token }}" + CHATML]
)
def test_the_pieces_write_what_the_template_writes(template):
    tokenizer = chat_templates.make_tokenizer(template)
    pieces = pieces_of(tokenizer)
    for roles in CHATS:
        messages = [{"role": role, "content": f"{role} says {i}"} for i, role in enumerate(roles)]
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert pieces.render(messages) == expected.removeprefix("<s>")


@pytest.mark.parametrize("template", [MOVES_SYSTEM, IGNORES_SYSTEM, DATED, "{{ raise_exception('no') }}"])
def test_a_template_that_is_no_text_around_messages_has_no_pieces(template):
    assert pieces_of(chat_templates.make_tokenizer(template)) is None


def saved(folder, template):
    tokenizer, model = chat_templates.make_tokenizer(template), make_llama()
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_modelfile_has_template_and_stops(tmp_path):
    assert modelfile(saved(tmp_path, SMOLLM2), "my.gguf") == (
        "FROM ./my.gguf\n"
        'TEMPLATE """{{ if not .System }}<|im_start|>system\nBe helpful.<|im_end|>\n{{ end }}{{ range .Messages }}'
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        '{{ end }}{{ end }}<|im_start|>assistant\n"""\n'
        'PARAMETER stop "</s>"\nPARAMETER stop "<|im_end|>"\n'
    )


def test_a_modelfile_says_that_it_has_no_template(tmp_path):
    text = modelfile(saved(tmp_path, MOVES_SYSTEM), "my.gguf")
    assert NO_TEMPLATE in text
    assert "TEMPLATE" not in text
