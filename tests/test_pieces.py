import pytest
import torch

from lisatune import LisaEngine, UniformSampler, UserError, find_layers
from lisatune.pieces import split_layers
from lisatune.samplers.scores import gradient_sq_norms
from tiny import VOCABULARY, make_llama

SEVEN = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip


def make_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=4))


def make_mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4,
        )
    )  # fmt: skip


def train_step(model, optimizer, step):
    ids = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(step))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def test_pool_is_every_matrix_of_every_layer_or_its_halves(llama):
    layers = find_layers(llama)
    assert split_layers(layers, "modules").pool() == tuple(f"layers.{i}.{name}" for i in range(4) for name in SEVEN)
    halves = tuple(f"layers.{i}.{half}" for i in range(4) for half in ("self_attn", "mlp"))
    assert split_layers(layers, "halves").pool() == halves
    sampled = split_layers(layers, "halves").pool(train_embedding="sampled", train_head="sampled")
    assert sampled == (*halves, "embedding", "head")


@pytest.mark.parametrize("pieces", ["modules", "halves"])
@pytest.mark.parametrize("make", [make_llama, lambda: make_llama(tied=True), make_gpt2, make_mixtral])
def test_every_parameter_belongs_to_exactly_one_part(make, pieces):
    model = make()
    whole = find_layers(model)
    parts = split_layers(whole, pieces).parts()
    names = [name for own in parts.values() for name in own]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    for part, own in whole.parts().items():
        inside = {name for other, pieced in parts.items() if f"{other}.".startswith(f"{part}.") for name in pieced}
        assert inside == set(own), part
    rest = [p for part, own in parts.items() if part.endswith(".rest") for p in own.values()]
    assert rest
    assert all(p.ndim == 1 for p in rest)


def test_experts_and_biases_go_with_their_matrices():
    gpt2 = split_layers(find_layers(make_gpt2()), "modules").parts()
    assert list(gpt2["layers.1.mlp.c_fc"]) == ["transformer.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_fc.bias"]
    mixtral = split_layers(find_layers(make_mixtral()), "modules").parts()
    assert {name.rpartition(".")[2] for name in mixtral["layers.0.mlp.experts"]} == {"gate_up_proj", "down_proj"}


def test_norms_inside_a_half_go_with_it_and_between_modules_with_none():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=8)  # fmt: skip
    layers, name = find_layers(Qwen3ForCausalLM(config)), "model.layers.1.self_attn.q_norm.weight"
    assert name in split_layers(layers, "halves").parts()["layers.1.self_attn"]
    assert name in split_layers(layers, "modules").parts()["layers.1.rest"]


def test_a_module_inside_of_a_module_is_a_piece_of_its_own(llama):
    outer, inner = llama.model.layers[0].mlp.up_proj, torch.nn.Linear(3, 3)
    outer.inner, outer.norm = inner, torch.nn.LayerNorm(3)
    parts = split_layers(find_layers(llama), "modules").parts()
    prefix = "model.layers.0.mlp.up_proj"
    assert list(parts["layers.0.mlp.up_proj.inner"]) == [f"{prefix}.inner.weight", f"{prefix}.inner.bias"]
    assert list(parts["layers.0.mlp.up_proj"]) == [f"{prefix}.weight", f"{prefix}.norm.weight", f"{prefix}.norm.bias"]


def test_layer_1_is_not_layer_10():
    parts = split_layers(find_layers(make_llama(layers=12)), "modules").parts()
    assert list(parts["layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj.weight"]
    assert list(parts["layers.10.mlp.up_proj"]) == ["model.layers.10.mlp.up_proj.weight"]


@pytest.mark.parametrize("pieces", ["modules", "halves"])
def test_only_the_pieces_drawn_have_gradients_and_state_and_change(llama, pieces):
    layers = split_layers(find_layers(llama), pieces)
    pool = layers.pool()
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-2)
    sampler = UniformSampler(len(pool), 3, seed=1)
    engine = LisaEngine(layers, sampler, interval_steps=2)
    changed_ever = set()
    for step in range(24):
        engine.begin_step(step, optimizer)
        before = {name: p.detach().clone() for name, p in llama.named_parameters()}
        train_step(llama, optimizer, step)
        drawn = sampler(step // 2)
        active = {pool[i] for i in drawn}
        for part, own in layers.parts().items():
            trains = part in active or part in ("embedding", "norm", "head")
            for name, p in own.items():
                assert p.requires_grad == (p.grad is not None) == (p in optimizer.state) == trains, name
                assert torch.equal(before[name], p) != trains, name
        assert set(gradient_sq_norms(layers, pool)) == set(drawn)
        assert layers.num_trainable(drawn) == sum(p.numel() for p in llama.parameters() if p.requires_grad)
        changed_ever |= active
        optimizer.zero_grad()
    assert len(changed_ever) > len(pool) / 2


def test_a_module_takes_a_fraction_of_the_memory_of_a_layer(llama):
    whole, modules = find_layers(llama), split_layers(find_layers(llama), "modules")
    frozen = {"train_embedding": False, "train_head": False}
    layer = whole.num_trainable((0,), **frozen)
    assert all(modules.num_trainable((i,), **frozen) < layer / 3 for i in range(len(modules.pool())))


def test_what_is_no_piece_is_as_before(llama):
    whole = find_layers(llama)
    halves = split_layers(whole, "halves")
    assert halves.decoder == whole.decoder
    assert halves.describe() == f"{whole.describe()}; 8 halves of decoder layers to draw from"
    ids = torch.arange(8)[None]
    assert torch.equal(halves.trunk(input_ids=ids), whole.trunk(input_ids=ids))


def test_refuses_another_word(llama):
    with pytest.raises(UserError, match="pieces is 'thirds': choose one of modules, halves"):
        split_layers(find_layers(llama), "thirds")
