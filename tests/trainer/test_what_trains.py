"""Heads, encoder-decoders, hybrids: with all layers active LISA is full training to the bit, whatever the model."""

import pytest
import torch
import transformers as hf

from lisatune import LisaCallback, LisaEngine, UniformSampler, UserError, find_layers, plan_memory
from tiny import make_llama

pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
from transformers import Trainer, TrainerCallback, TrainingArguments

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 0, "forced_eos_token_id": None, "dropout": 0.0,
}  # fmt: skip
QUIET = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
T5GEMMA = {k: v for k, v in SMALL.items() if "token" not in k} | {"num_key_value_heads": 2, "head_dim": 8}
T5GEMMA |= {"dropout_rate": 0.0, "attention_dropout": 0.0}
JAMBA = SMALL | {
    "num_key_value_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
    "expert_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4, "use_mamba_kernels": False,
}  # fmt: skip
MODELS = {
    "score": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**SMALL, num_labels=3)),
    "qa_outputs": lambda: hf.LlamaForQuestionAnswering(hf.LlamaConfig(**SMALL)),
    "bert's transform": lambda: hf.BertLMHeadModel(hf.BertConfig(**SMALL, **QUIET, is_decoder=True)),
    "masked": lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL, **QUIET)),
    "modernbert": lambda: hf.ModernBertDecoderForCausalLM(
        hf.ModernBertDecoderConfig(**SMALL, cls_token_id=1, sep_token_id=2)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0)),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SEQ2SEQ)),
    "marian": lambda: hf.MarianMTModel(hf.MarianConfig(**SEQ2SEQ)),
    "t5gemma": lambda: hf.T5GemmaForConditionalGeneration(
        hf.T5GemmaConfig(
            encoder=T5GEMMA, decoder=T5GEMMA, vocab_size=96, dropout_rate=0.0, attention_dropout=0.0,
            classifier_dropout_rate=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ),
    "jamba": lambda: hf.JambaForCausalLM(hf.JambaConfig(**JAMBA)),
}  # fmt: skip
NUM_LAYERS = {"t5": 4, "bart": 4, "marian": 4, "t5gemma": 6}


def make(name):
    torch.manual_seed(0)
    return MODELS[name]()


def rows(name):
    ids = torch.randint(3, 90, (16, 8), generator=torch.Generator().manual_seed(0)).tolist()
    if name == "score":
        return [{"input_ids": row, "labels": i % 3} for i, row in enumerate(ids)]
    if name == "qa_outputs":
        return [{"input_ids": row, "start_positions": i % 8, "end_positions": 7} for i, row in enumerate(ids)]
    return [{"input_ids": row, "labels": row} for row in ids]


def fit(model, folder, callbacks, data, **more):
    settings = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "save_strategy": "no"} | more
    arguments = TrainingArguments(
        output_dir=str(folder), **settings, use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=100
    )
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks).train()


@pytest.mark.parametrize("name", MODELS)
def test_with_all_layers_active_it_is_full_training_to_the_bit(name, tmp_path):
    lisa, full = make(name), make(name)
    before = {n: p.detach().clone() for n, p in lisa.named_parameters()}
    num_layers = len(find_layers(lisa).decoder)
    assert num_layers == NUM_LAYERS.get(name, 3)
    fit(lisa, tmp_path, [LisaCallback(num_layers, 2)], rows(name))
    fit(full, tmp_path, [], rows(name))
    for (n, a), b in zip(lisa.named_parameters(), full.parameters(), strict=True):
        assert torch.equal(a, b), n
        never_used = "position" in n or "pooler" in n  # sinusoids, which their authors freeze, and rows of longer texts
        assert never_used or not torch.equal(before[n], a), n


class Moved(TrainerCallback):
    """The parts that moved in each step, next to those that should."""

    def __init__(self, lisa):
        self.lisa, self.seen = lisa, []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        parts = self.lisa.engine.layers.parts()
        moved = {part for part, own in parts.items() if any(not torch.equal(self.before[n], p) for n, p in own.items())}
        wanted = {part for part in self.lisa.engine.trained_parts(self.lisa.engine.drawn) if parts[part]}
        self.seen.append((moved, wanted))


@pytest.mark.parametrize("name", ["score", "t5", "marian", "jamba"])
def test_only_what_is_active_moves(name, tmp_path):
    lisa = LisaCallback(1, 1, seed=3)
    watch = Moved(lisa)
    fit(make(name), tmp_path, [lisa, watch], rows(name), max_steps=6)
    assert len(watch.seen) == 6
    assert all(moved == wanted for moved, wanted in watch.seen)
    assert len({tuple(moved) for moved, _ in watch.seen}) > 1


def test_a_bidirectional_model_is_refused_under_a_causal_loss(tmp_path):
    model = hf.BertLMHeadModel(hf.BertConfig(**SMALL))
    with pytest.raises(UserError, match="every token of BertLMHeadModel sees later tokens.*is_decoder=True"):
        fit(model, tmp_path, [LisaCallback(1, 1)], rows("bert"))


@pytest.mark.parametrize("num_experts", [2])
def test_a_routers_bias_that_its_authors_froze_is_left_alone(num_experts, tmp_path):
    config = hf.Ernie4_5_MoeConfig(
        **SMALL, num_key_value_heads=2, moe_intermediate_size=16, moe_num_experts=num_experts, moe_k=1
    )
    model = hf.Ernie4_5_MoeForCausalLM(config)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen
    assert frozen == list(find_layers(model).parts()["fixed"])
    fit(model, tmp_path, [LisaCallback(1, 1)], rows("ernie"))
    assert frozen == [n for n, p in model.named_parameters() if not p.requires_grad]
    assert plan_memory(config, max_length=8).num_layers == 3


def test_what_a_user_froze_is_refused_with_the_remedy(tmp_path):
    model = make_llama()
    model.requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    with pytest.raises(UserError, match=r"was frozen before; call model\.requires_grad_\(True\)"):
        fit(model, tmp_path, [LisaCallback()], rows("llama"))


def test_a_list_of_several_kinds_of_blocks_is_found_next_to_a_list_inside_a_block():
    config = hf.Zamba2Config(
        vocab_size=96, hidden_size=32, num_hidden_layers=4, layers_block_type=["mamba", "hybrid", "mamba", "mamba"],
        n_mamba_heads=8, mamba_d_state=8, chunk_size=8, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=64, adapter_rank=4,
    )  # fmt: skip
    assert find_layers(hf.Zamba2ForCausalLM(config)).decoder_name == "model.layers"


def test_encoder_and_decoder_can_be_named_by_hand():
    model = make("bart")
    layers = find_layers(model, "model.encoder.layers,model.decoder.layers")
    assert layers.decoder == find_layers(model).decoder
    layers = find_layers(model, "model.decoder.layers")
    assert len(layers.decoder) == 2


def test_several_lists_are_refused_with_a_name_that_takes_them_all():
    sizes = SMALL | {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8}
    model = hf.HrmTextForCausalLM(hf.HrmTextConfig(**sizes))
    with pytest.raises(UserError, match="several lists of layers in HrmTextForCausalLM") as refused:
        find_layers(model)
    layers = find_layers(model, str(refused.value).rpartition("decoder_name=")[2])
    assert len(layers.decoder) == 4
    assert not layers.parts()["outside"]


def test_what_is_outside_is_named():
    model = make("marian")
    assert "frozen by its authors 65,536: model.encoder.embed_positions, model.decoder.embed_positions" in (
        find_layers(model).describe()
    )


def test_an_engine_gives_the_model_back():
    model = make_llama()
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([*model.parameters()])
    engine = LisaEngine(find_layers(model), UniformSampler(4, 1))
    engine.begin_step(0, optimizer)
    assert sum(p.requires_grad for p in model.parameters()) == 12
    engine.release()
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.layers.1.self_attn.q_proj.weight"]
