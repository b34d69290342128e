import math

import pytest
import torch
from torch import nn

from lisatune import LisaEngine, UniformSampler, UserError, find_layers
from lisatune.samplers.scores import (
    gradient_sq_norms,
    input_norms,
    outlier_scores,
    weight_norm_ratio,
)
from lisatune.samplers.weighted import WeightedSampler
from tiny import VOCABULARY, make_llama
from weight_norms import MeanWeightNorms, mean_weight_norms


def ids(seed=0, rows=2):
    return torch.randint(3, VOCABULARY, (rows, 8), generator=torch.Generator().manual_seed(seed))


def backward(model, seed=0):
    model(input_ids=ids(seed), labels=ids(seed)).loss.backward()


def make_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=4))


def test_ratio_is_the_papers_p():
    assert weight_norm_ratio({"head": 3.0, "layers.0": 1.0}, {"layers.0": 4.0, "head": 2.0}) == {
        "layers.0": 0.25, "head": 1.5,
    }  # fmt: skip


@pytest.mark.parametrize(("lora", "full", "message"), [
    ({"head": 1.0}, {"head": 1.0, "layers.0": 1.0}, r"only one of the two runs has a norm of layers\.0"),
    ({"head": 1.0, "layers.0": 1.0}, {"head": 1.0}, r"only one of the two runs has a norm of layers\.0"),
    ({"head": 1.0}, {"head": 0.0}, "the norm of head in the full run is 0"),
])  # fmt: skip
def test_ratio_refuses_runs_that_do_not_go_together(lora, full, message):
    with pytest.raises(UserError, match=message):
        weight_norm_ratio(lora, full)


def test_norms_of_untrained_adapters_are_those_of_the_papers_figure():
    """Rank 128 on all seven matrices: sqrt(7) * sqrt(128 / 3) = 17.3 whatever the width, and no training is in it."""
    from lisatune.methods.lora import add_adapters

    model = make_llama(hidden_size=64, intermediate_size=128)
    model = add_adapters(model, r=128, alpha=32, dropout=0.0, targets="all-linear")
    norms = mean_weight_norms(find_layers(model), trained_only=True)
    assert sorted(norms) == [f"layers.{i}" for i in range(4)]
    for norm in norms.values():
        assert norm == pytest.approx(17.28, rel=0.02)  # 65,536 uniform draws: 0.2% is one standard deviation


@pytest.mark.parametrize("tied", [False, True])
def test_mean_weight_norms_are_means_over_steps_of_l2_norms(tied):
    model = make_llama(tied=tied)
    layers = find_layers(model)
    running, expected = MeanWeightNorms(layers), {}
    for _ in range(3):
        for p in model.parameters():
            p.data.add_(0.1)
        running.add()
        for part, parameters in layers.parts().items():
            if parameters:
                flat = torch.cat([p.flatten() for p in parameters.values()]).double()
                expected[part] = expected.get(part, 0) + flat.norm().item() / 3
    assert running.mean() == pytest.approx(expected, rel=1e-6)  # float32 norms: 6e-8 each
    assert ("head" in expected) != tied
    assert MeanWeightNorms(layers).mean() == {}


def test_bfloat16_weights_have_the_norm_of_their_values():
    model = make_llama().bfloat16()
    expected = mean_weight_norms(find_layers(make_llama().bfloat16().float()))
    assert mean_weight_norms(find_layers(model)) == pytest.approx(expected, rel=1e-6)


def test_gradient_norms_are_of_the_active_layers_alone(llama):
    optimizer, layers = torch.optim.AdamW(llama.parameters()), find_layers(llama)
    engine = LisaEngine(layers, UniformSampler(4, 2, seed=0), interval_steps=1)
    for step in range(8):
        engine.begin_step(step, optimizer)
        backward(llama, step)
        norms = gradient_sq_norms(layers)
        assert tuple(sorted(norms)) == engine.active
        for layer, value in norms.items():
            gradients = [p.grad.flatten() for p in llama.model.layers[layer].parameters()]
            squares = torch.cat(gradients).double().square()
            assert value == pytest.approx(squares.sum().item(), rel=1e-6)
            assert gradient_sq_norms(layers, mean=True)[layer] == pytest.approx(squares.mean().item(), rel=1e-6)
        optimizer.zero_grad()
    assert gradient_sq_norms(layers) == {}


def test_keys_of_gradient_norms_count_the_pool(llama):
    layers = find_layers(llama)
    backward(llama)
    pool = layers.pool(train_embedding="sampled", train_head="sampled")
    norms = gradient_sq_norms(layers, pool)
    assert sorted(norms) == list(range(6))
    assert norms[4] == pytest.approx(llama.model.embed_tokens.weight.grad.square().sum().item(), rel=1e-6)
    assert norms[5] == pytest.approx(llama.lm_head.weight.grad.square().sum().item(), rel=1e-6)
    assert {i: norms[i] for i in range(4)} == gradient_sq_norms(layers)


def test_gradient_norms_of_bfloat16_are_summed_in_float32(llama):
    """In bfloat16 a sum of 4,096 squares would stall at 256 of them."""
    layers = find_layers(llama.bfloat16())
    for p in llama.parameters():
        p.grad = torch.ones_like(p)
    sizes = layers.num_parameters()
    assert gradient_sq_norms(layers) == pytest.approx({i: float(sizes[f"layers.{i}"]) for i in range(4)}, rel=1e-6)


def test_gradient_norms_wait_for_the_device_once(llama, monkeypatch):
    """Counted: numbers are fetched in one list, not one by one."""
    backward(llama)
    fetched = []
    plain = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: fetched.append(t.numel()) or plain(t))
    monkeypatch.setattr(torch.Tensor, "item", lambda t: pytest.fail("a number was fetched by itself"))
    gradient_sq_norms(find_layers(llama), mean=True)
    assert fetched == [4]


def test_outliers_are_counted_against_the_mean_of_their_layer():
    """By the definition, on all of a layer's matrices put side by side."""
    model = make_llama()
    for number, layer in enumerate(model.model.layers):
        layer.mlp.up_proj.weight.data[:number] *= 40
    scores = outlier_scores(find_layers(model), multiple=5.0)
    assert list(scores) == [0, 1, 2, 3]
    for number, layer in enumerate(model.model.layers):
        flat = torch.cat([p.detach().abs().flatten() for p in layer.parameters() if p.ndim == 2])
        assert scores[number] == (flat > 5 * flat.mean()).sum().item() / flat.numel()
    assert 0 <= scores[0] < scores[1] < scores[2] < scores[3]
    sampler = WeightedSampler(4, 1, tuple(scores.values()), seed=0)  # what OWS draws by
    assert sampler.inclusion(0)[3] == max(sampler.inclusion(0))


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_input_norms_are_root_mean_squares_of_what_each_matrix_is_multiplied_with(make):
    model = make()
    layers = find_layers(model)
    batches = [{"input_ids": ids(seed)} for seed in range(2)]
    norms = input_norms(layers, batches)
    matrices = {
        name for part, own in layers.parts().items() if "layers." in part for name, p in own.items() if p.ndim == 2
    }
    assert set(norms) == matrices
    name = next(name for name in norms if name.endswith(("down_proj.weight", "mlp.c_proj.weight")))
    module = model.get_submodule(name.removesuffix(".weight"))
    seen = []
    handle = module.register_forward_pre_hook(lambda _m, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        model.eval()
        for batch in batches:
            model(**batch)
    handle.remove()
    expected = torch.cat(seen).square().mean(dim=0).sqrt()
    torch.testing.assert_close(norms[name].flatten(), expected)
    assert norms[name].shape == ((expected.numel(), 1) if make is make_gpt2 else (expected.numel(),))


def test_an_input_that_is_large_makes_outliers_of_its_column():
    model = make_llama()
    layers = find_layers(model)
    norms = input_norms(layers, [{"input_ids": ids()}])
    for name, p in model.named_parameters():
        if name in norms:
            p.data.fill_(0.01)
            norms[name] = torch.ones_like(norms[name])
    assert set(outlier_scores(layers, norms).values()) == {0.0}
    norms["model.layers.2.self_attn.q_proj.weight"][5] = 1_000.0
    scores = outlier_scores(layers, norms)
    numel = sum(p.numel() for p in model.model.layers[2].parameters() if p.ndim == 2)
    assert scores == {0: 0.0, 1: 0.0, 2: pytest.approx(32 / numel), 3: 0.0}


def test_measuring_leaves_the_model_as_it_was(llama):
    llama.train()
    before = {name: p.clone() for name, p in llama.state_dict().items()}
    layers = find_layers(llama)
    outlier_scores(layers, input_norms(layers, [{"input_ids": ids()}]))
    assert all(torch.equal(before[name], p) for name, p in llama.state_dict().items())
    assert llama.training
    assert all(p.requires_grad and p.grad is None for p in llama.parameters())
    assert not any(m._forward_pre_hooks for m in llama.modules())


def test_refusals(llama):
    layers = find_layers(llama)
    with pytest.raises(UserError, match="no input reached a linear layer: give at least one batch"):
        input_norms(layers, [])
    with pytest.raises(UserError, match=r"layers\.0 has no matrix whose inputs were measured"):
        outlier_scores(layers, {})


def test_normal_weights_have_the_outliers_that_the_bell_curve_tells():
    """Above 3 times the mean of absolute values, which is 2.39 standard deviations: 1.67% of weights."""
    model = make_llama(hidden_size=64, intermediate_size=256)
    for p in model.parameters():
        if p.ndim == 2:
            nn.init.normal_(p)
    share = math.erfc(3 * math.sqrt(2 / math.pi) / math.sqrt(2))
    for score in outlier_scores(find_layers(model), multiple=3.0).values():
        assert score == pytest.approx(share, rel=0.1)  # 60,000 weights: 3% is one standard deviation
