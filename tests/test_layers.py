"""Every architecture here is random and tiny; what is checked is what ``find_layers`` sees of its structure."""

import pytest
import torch
import transformers as hf
from torch import nn

from lisatune import LisaEngine, UniformSampler, UserError, find_layers
from tiny import make_llama

LLAMA_LIKE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT_LIKE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
IDS = {"bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "llama": (hf.LlamaConfig, LLAMA_LIKE, "model.layers"),
    "qwen2": (hf.Qwen2Config, LLAMA_LIKE, "model.layers"),
    "qwen3": (hf.Qwen3Config, LLAMA_LIKE | {"head_dim": 8}, "model.layers"),
    "mistral": (hf.MistralConfig, LLAMA_LIKE, "model.layers"),
    "gemma": (hf.GemmaConfig, LLAMA_LIKE | {"head_dim": 8}, "model.layers"),
    "gemma2": (hf.Gemma2Config, LLAMA_LIKE | {"head_dim": 8}, "model.layers"),
    "phi": (hf.PhiConfig, LLAMA_LIKE, "model.layers"),
    "phi3": (hf.Phi3Config, LLAMA_LIKE, "model.layers"),
    "mixtral": (hf.MixtralConfig, LLAMA_LIKE | {"num_local_experts": 4}, "model.layers"),
    "gpt2": (hf.GPT2Config, {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, **IDS}, "transformer.h"),
    "gpt_neox": (hf.GPTNeoXConfig, GPT_LIKE | {"intermediate_size": 64, **IDS}, "gpt_neox.layers"),
    "opt": (hf.OPTConfig, GPT_LIKE | {"ffn_dim": 64, "word_embed_proj_dim": 32, **IDS}, "model.decoder.layers"),
    "falcon": (hf.FalconConfig, GPT_LIKE | IDS, "transformer.h"),
}


def build(name):
    make_config, settings, _ = MODELS[name]
    return hf.AutoModelForCausalLM.from_config(make_config(**settings))


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_found(name):
    model = build(name)
    layers = find_layers(model)
    assert layers.decoder_name == MODELS[name][2]
    assert len(layers.decoder) == 3
    assert layers.embedding is model.get_input_embeddings()
    assert layers.head is model.get_output_embeddings()
    counts = layers.num_parameters()
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert counts["outside"] == 0
    assert counts["norm"] > 0
    assert (counts["head"] == 0) == layers.tied
    assert all(counts[f"layers.{i}"] > 0 for i in range(3))


@pytest.mark.parametrize("name", MODELS)
def test_one_step_of_lisa_trains_the_drawn_layer_alone(name):
    model = build(name)
    layers = find_layers(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = LisaEngine(layers, UniformSampler(3, 1), interval_steps=1)
    engine.begin_step(0, optimizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = torch.randint(3, 96, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for part, parameters in layers.parts().items():
        trained = part in ("embedding", "norm", "head", f"layers.{engine.active[0]}")
        # weights that no token went through, such as those of an idle expert, may stay as they are
        changed = [not torch.equal(before[n], p) for n, p in parameters.items()]
        assert any(changed) == (trained and bool(parameters)), part


@pytest.mark.parametrize("name", MODELS)
def test_trunk_and_head_give_the_models_logits(name):
    model = build(name).eval()
    layers = find_layers(model)
    ids = torch.randint(3, 96, (2, 8))
    with torch.no_grad():
        same = torch.equal(layers.head(layers.trunk(input_ids=ids)), model(input_ids=ids).logits)
    assert same == layers.head_is_linear() == (name != "gemma2")  # gemma2 caps its logits


def vision_language_model():
    config = hf.Qwen2VLConfig(
        text_config=LLAMA_LIKE | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        vision_config={"depth": 5, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2},
        **IDS,
    )
    return hf.Qwen2VLForConditionalGeneration(config)


def test_vision_tower_is_not_the_decoder_and_is_never_trained():
    model = vision_language_model()
    layers = find_layers(model)
    assert layers.decoder_name == "model.language_model.layers"
    assert len(layers.decoder) == 3
    assert layers.num_parameters()["outside"] == sum(p.numel() for p in model.model.visual.parameters()) > 0
    optimizer = torch.optim.AdamW(model.parameters())
    LisaEngine(layers, UniformSampler(3, 1)).begin_step(0, optimizer)
    assert not any(p.requires_grad for p in model.model.visual.parameters())
    assert (
        f"outside the text model {sum(p.numel() for p in model.model.visual.parameters()):,}: model.visual"
        in layers.describe()
    )


def test_position_embeddings_belong_to_the_embedding():
    """If they trained while the embedding is frozen, the backward pass would still go to the bottom."""
    parts = find_layers(build("gpt2")).parts()
    assert set(parts["embedding"]) == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert set(parts["norm"]) == {"transformer.ln_f.weight", "transformer.ln_f.bias"}


def test_experts_are_not_decoder_layers():
    layers = find_layers(build("mixtral"))
    assert all("experts" in " ".join(n for n, _ in layer.named_parameters()) for layer in layers.decoder)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embedding_is_counted_once(tied):
    model = make_llama(tied=tied)
    counts = find_layers(model).num_parameters()
    assert (counts["embedding"], counts["head"]) == (128 * 32, 0 if tied else 128 * 32)


def test_model_without_decoder_layers_gets_a_clear_error():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(8, 4)

        def get_input_embeddings(self):
            return self.embed

    with pytest.raises(UserError, match=r"found no decoder layers in Plain: name them by hand with decoder_name="):
        find_layers(Plain())
    with pytest.raises(UserError, match="has no get_input_embeddings"):
        find_layers(nn.Linear(2, 2))


def test_layers_can_be_named_by_hand():
    model = make_llama()
    assert find_layers(model, "model.layers").decoder_name == "model.layers"
    with pytest.raises(UserError, match=r"'model\.layer' is not a list of layers"):
        find_layers(model, "model.layer")
