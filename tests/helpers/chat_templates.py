"""Tokenizers and chat templates of chosen habits, for inputs made in the tests."""

from __future__ import annotations

from typing import Any

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# writes tools first, and calls after the content
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + ' ' }}{{ c.function.arguments | tojson }}{{ '</call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# as Qwen3's: only the answer to the last question keeps its thought, and it always has one
FORGETS_THOUGHTS = (
    "{% set n = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set n.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% set parts = m.content.split('</think>') %}"
    "{% if m.role == 'assistant' and loop.index0 > n.last %}"
    "{{ '<think>\n' + (parts[0].split('<think>')[-1].strip() if parts | length > 1 else '') + '\n</think>\n\n' }}{% endif %}"
    "{{ parts[-1].lstrip('\n') if m.role == 'assistant' else m.content }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# as DeepSeek-R1's: the prompt opens a thought, and answers are shown without theirs
OPENS_THOUGHT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1].lstrip() + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# as Mistral's: the system prompt stands in the last question
MOVES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}{% set chat = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set chat = messages %}{% endif %}{% set n = namespace(last=0) %}"
    "{% for m in chat %}{% if m.role == 'user' %}{% set n.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in chat %}{% if m.role == 'user' %}{{ '[Q]' + (s if loop.index0 == n.last else '') + m.content + '[/Q]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
DATED = "{{ 'It is ' + strftime_now('%Y-%m-%d') + '\n' }}" + CHATML
SHOWS_REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '[' + m.reasoning_content + ']' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IGNORES_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")


def make_tokenizer(template: str | None = CHATML, *, adds_bos: bool = False, adds_space: bool = False) -> Any:
    """Bytes as tokens, ``<s>`` and ``</s>`` and ChatML's marks; ``adds_space`` begins each text with a space, as Llama 2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=adds_space, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    return tokenizer


def marked(tokenizer: Any, document: Any) -> str:
    """A document's text, what is learned of it in brackets."""
    text, on = "", False
    for token, label in zip(document.ids, document.labels, strict=True):
        if (label != -100) != on:
            on = not on
            text += "⟦" if on else "⟧"
        text += tokenizer.decode([token])
    return text + "⟧" * on
