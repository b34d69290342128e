"""Models that count positions in their own way, and models that look ahead."""

import pytest
import torch
import transformers as hf
from transformers.models.kosmos2_5.modeling_kosmos2_5 import Kosmos2_5TextForCausalLM

from lisatune import UserError, find_layers
from lisatune.data.loader import Batch
from lisatune.loss import batch_loss
from lisatune.settings import build_config
from lisatune.train import train
from tiny import make_tokenizer

SMALL = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 80, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KINDS = {
    "roberta": (hf.RobertaForCausalLM, hf.RobertaConfig, {"pad_token_id": 1}),
    "xlm-roberta": (hf.XLMRobertaForCausalLM, hf.XLMRobertaConfig, {"pad_token_id": 1}),
    "kosmos-2.5": (
        Kosmos2_5TextForCausalLM,
        hf.Kosmos2_5TextConfig,
        {"pad_token_id": 1, "embed_dim": 32, "layers": 2, "ffn_dim": 64, "attention_heads": 4},
    ),
    "bert": (hf.BertLMHeadModel, hf.BertConfig, {"pad_token_id": 0}),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_loss_is_the_models_own(name):
    kind, config, more = KINDS[name]
    model = kind(config(**SMALL, **more, is_decoder=True)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight)  # so that a wrong position shows
    ids = torch.randint(3, 128, (2, 8))
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    batch = Batch(ids, labels, torch.arange(8).repeat(2, 1), torch.ones(2, 8, dtype=torch.bool))
    ours = batch_loss(find_layers(model), batch, 14, linear_head=False)
    torch.testing.assert_close(ours, model(input_ids=ids, labels=ids).loss)


def test_training_a_model_that_looks_ahead_is_refused(tmp_path, data_file):
    tokenizer = make_tokenizer()
    hf.RobertaForCausalLM(hf.RobertaConfig(**SMALL | {"vocab_size": len(tokenizer)}, pad_token_id=0)).save_pretrained(
        tmp_path / "model"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    config = {
        "model": str(tmp_path / "model"),
        "data": str(data_file),
        "output": str(tmp_path / "run"),
        "max_length": 64,
    }
    with pytest.raises(UserError, match="every token of RobertaForCausalLM sees later tokens"):
        train(build_config(config | {"num_active": 1}))
