"""Tiny random models, a tokenizer for them, and a few rows of data: they build in milliseconds, and nothing is downloaded."""

import json
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 128


def make_llama(*, layers: int = 4, tied: bool = False, seed: int = 0, **settings: Any) -> Any:
    """A random Llama of width 32 and vocabulary 128; builds in 20 ms."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        **(
            {
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": layers,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "tie_word_embeddings": tied,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
            }
            | settings
        )
    )
    return LlamaForCausalLM(config)


def make_tokenizer() -> Any:
    """Bytes as tokens, after pad, begin and end: enough for any text, and nothing to download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - 3]
    assert all(chr(c) in alphabet or c == 32 for c in range(33, 127))
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    for newline_or_space in "ĊĠ":
        vocabulary.setdefault(newline_or_space, len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def write_rows(path: Path) -> Path:
    """Write sixty short questions and answers to ``path``, and return it."""
    rows = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
