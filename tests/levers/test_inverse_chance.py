from itertools import combinations

import pytest
import torch

from lisatune import AdamW, LisaEngine, UniformSampler, UserError, find_layers
from lisatune.levers.inverse_chance import ChanceCorrection, active_chances
from lisatune.levers.optimizer_in_backward import StepInBackward
from lisatune.samplers.fixed import FixedSampler
from lisatune.samplers.weighted import WeightedSampler
from tiny import VOCABULARY, make_llama

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "ours": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
}


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def backward(model, seed=0):
    ids = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids).loss.backward()


def one_step(drawn, chances, make_optimizer):
    """How far one LISA step moves each weight."""
    model = make_llama()
    layers, optimizer = find_layers(model), make_optimizer(model.parameters())
    engine = LisaEngine(layers, FixedSampler(4, drawn), interval_steps=1)
    engine.begin_step(0, optimizer)
    if chances is not None:
        ChanceCorrection(optimizer).set(active_chances(layers, layers.pool(), drawn, chances))
    before = weights(model)
    backward(model)
    optimizer.step()
    return {name: after.double() - before[name] for name, after in weights(model).items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_expected_over_all_draws_is_the_full_step(name):
    """Every set of 2 of 4 layers, by its chance; weighted draws too. Of fresh optimizers, whose first step it is."""
    full = one_step((0, 1, 2, 3), None, OPTIMIZERS[name])
    sampler = WeightedSampler(4, 2, (1.0, 2.0, 3.0, 4.0))
    uniform = UniformSampler(4, 2)
    by_weight = {
        (a, b): w[a] * w[b] / 10 * (1 / (10 - w[a]) + 1 / (10 - w[b]))
        for w in [sampler.weights] for a, b in combinations(range(4), 2)
    }  # fmt: skip
    for chances_of_sets, inclusion in [
        (dict.fromkeys(combinations(range(4), 2), 1 / 6), uniform.inclusion(0)),
        (by_weight, sampler.inclusion(0)),
    ]:
        expected = dict.fromkeys(full, 0.0)
        for drawn, chance in chances_of_sets.items():
            for weight, moved in one_step(drawn, inclusion, OPTIMIZERS[name]).items():
                expected[weight] = expected[weight] + chance * moved
        for weight, moved in full.items():
            # float32 weights of size 1 are rounded to 6e-8 at each of some ten steps
            torch.testing.assert_close(expected[weight], moved, rtol=1e-4, atol=3e-7)


def test_without_it_the_expected_step_is_a_share_of_the_full_one():
    """What is corrected is there: 2 of 4 layers move half as far."""
    full = one_step((0, 1, 2, 3), None, OPTIMIZERS["sgd"])
    draws = list(combinations(range(4), 2))
    name = "model.layers.1.mlp.up_proj.weight"
    mean = sum(one_step(drawn, None, OPTIMIZERS["sgd"])[name] for drawn in draws) / len(draws)
    torch.testing.assert_close(mean, full[name] / 2, rtol=1e-4, atol=3e-7)


def test_chance_1_changes_nothing_to_the_bit():
    def train(correct):
        model = make_llama()
        layers, optimizer = find_layers(model), torch.optim.AdamW(model.parameters(), lr=1e-2)
        if correct:
            correction = ChanceCorrection(optimizer)
            correction.set(active_chances(layers, layers.pool(), range(4), UniformSampler(4, 4).inclusion(0)))
            assert correction.chances == {}  # so nothing is copied
        for step in range(4):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        return weights(model)

    plain, corrected = train(False), train(True)
    assert all(torch.equal(plain[name], corrected[name]) for name in plain)


def test_frozen_weights_keep_their_bytes_and_state_is_as_without(llama):
    layers, optimizer = find_layers(llama), torch.optim.AdamW(llama.parameters(), lr=1e-2)
    sampler = UniformSampler(4, 1, seed=0)
    engine, correction = LisaEngine(layers, sampler, interval_steps=2), ChanceCorrection(optimizer)
    for step in range(8):
        if engine.begin_step(step, optimizer):
            correction.set(active_chances(layers, engine.pool, engine.drawn, sampler.inclusion(step // 2)))
        before = weights(llama)
        backward(llama, step)
        optimizer.step()
        optimizer.zero_grad()
        active = {f"model.layers.{i}." for i in engine.active}
        for name, after in weights(llama).items():
            if name.startswith("model.layers."):
                assert torch.equal(before[name], after) != name.startswith(tuple(active))
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in optimizer.state.values())


def test_no_copy_of_weights_is_left_after_the_step_and_remove_ends_it():
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    correction = ChanceCorrection(optimizer)
    correction.set({weight: 0.25})
    weight.grad = torch.ones(4)
    optimizer.step()
    assert weight.tolist() == [-3.0] * 4
    assert correction._before == {}
    correction.remove()
    optimizer.step()
    assert weight.tolist() == [-4.0] * 4


def test_a_bfloat16_step_is_stretched_from_where_it_was_rounded_to():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    ChanceCorrection(optimizer).set({weight: 0.5})
    weight.grad = torch.full_like(weight, 0.0078125)  # two steps of bfloat16 below 1
    optimizer.step()
    assert weight.item() == 1 - 2 * 0.0078125


@pytest.mark.parametrize("chance", [0.0, -0.5, 1.5, float("nan")])
def test_refuses_what_is_no_chance_of_an_active_parameter(chance):
    weight = torch.nn.Parameter(torch.ones(4))
    correction = ChanceCorrection(torch.optim.SGD([weight], lr=1.0))
    with pytest.raises(UserError, match="an active parameter has the chance"):
        correction.set({weight: chance})


def test_refuses_updates_made_in_the_backward_pass(llama):
    layers, optimizer = find_layers(llama), AdamW(llama.parameters())
    StepInBackward(optimizer)
    ChanceCorrection(optimizer).set(active_chances(layers, layers.pool(), (0,), (0.25,) * 4))
    backward(llama)
    with pytest.raises(UserError, match="take no steps in the backward pass"):
        optimizer.step()
