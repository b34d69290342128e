"""Small steps of frozen layers, against SGD on the same matrices."""

import pytest
import torch
from torch import nn

from lisatune import LisaEngine, UniformSampler, UserError, find_layers
from lisatune.levers.frozen_learning_rate import FrozenUpdates
from lisatune.levers.gradient_checkpointing import checkpoint_layers
from tiny import VOCABULARY, make_llama

IDS = torch.randint(3, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(0))


def matrices(layers):
    return {
        f"{i}.{n}": m.weight
        for i, d in enumerate(layers.decoder)
        for n, m in d.named_modules()
        if isinstance(m, nn.Linear)
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_matrices_take_the_steps_of_sgd(checkpointing):
    """Every frozen one, in three steps; to rounding, since sums are taken in another order: 1e-6 of weights near 0.02."""
    fast, slow = make_llama(), make_llama()
    layers, reference = find_layers(fast), find_layers(slow)
    if checkpointing:
        checkpoint_layers(layers.decoder)
    FrozenUpdates(layers.decoder, lr=0.1)
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.0)
    engine = LisaEngine(layers, UniformSampler(4, 1, seed=0), interval_steps=1)
    for step in range(3):
        engine.begin_step(step, optimizer)
        fast.train()
        fast(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.zero_grad()
        slow(input_ids=IDS, labels=IDS).loss.backward()
        with torch.no_grad():
            for name, weight in matrices(reference).items():
                if int(name.split(".")[0]) not in engine.active:
                    weight -= 0.1 * weight.grad
        slow.zero_grad()
        for name, weight in matrices(reference).items():
            assert torch.allclose(matrices(layers)[name], weight, rtol=0, atol=1e-6), (step, name)
    assert not any(
        torch.equal(w, b)
        for w, b in zip(matrices(layers).values(), matrices(find_layers(make_llama())).values(), strict=True)
    )


def test_the_gradients_of_what_trains_are_those_of_before(llama):
    """A weight moves only after the gradient of its input was made: to the bit."""
    reference = make_llama()
    for model in (llama, reference):
        layers = find_layers(model)
        LisaEngine(layers, UniformSampler(4, 1, seed=1)).begin_step(0, torch.optim.SGD(model.parameters()))
        if model is llama:
            FrozenUpdates(layers.decoder, lr=10.0)
        model(input_ids=IDS, labels=IDS).loss.backward()
    for a, b in zip(llama.parameters(), reference.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)


def test_without_gradients_nothing_moves(llama):
    layers = find_layers(llama)
    FrozenUpdates(layers.decoder, lr=0.1)
    llama.requires_grad_(False)
    before = {n: w.clone() for n, w in matrices(layers).items()}
    with torch.no_grad():
        llama(input_ids=IDS)
    llama(input_ids=IDS)
    layers.decoder[3].requires_grad_(True)  # below it nothing is differentiated
    llama(input_ids=IDS, labels=IDS).loss.backward()
    assert all(torch.equal(before[n], w) for n, w in matrices(layers).items())


def test_in_bfloat16_small_steps_arrive_on_average():
    layer = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight.fill_(1.0)
    updates = FrozenUpdates([nn.Sequential(layer)], lr=1e-4)
    for number in range(20):
        updates.number = number
        layer(torch.ones(1, 64, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    # 20 steps of 1e-4 from 1; the noise of the mean of 4096 weights whose digits are 1/256 apart is below 2e-5 a step
    assert 1 - layer.weight.float().mean().item() == pytest.approx(20e-4, rel=0.1)


def test_blocks_change_nothing(monkeypatch):
    a, b = make_llama(), make_llama()
    for model in (a, b):
        layers = find_layers(model)
        if model is b:
            monkeypatch.setattr("lisatune.levers.frozen_learning_rate.BLOCK", 100)
        FrozenUpdates(layers.decoder, lr=0.1)
        for layer in layers.decoder:
            layer.requires_grad_(False)
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(torch.allclose(x, y, rtol=0, atol=1e-7) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_model_without_such_matrices_is_refused():
    with pytest.raises(UserError, match=r"no decoder layer holds an nn\.Linear"):
        FrozenUpdates([nn.Sequential(nn.LayerNorm(3))], lr=0.1)


def test_steps_by_the_sign_are_of_one_length():
    layer = nn.Linear(3, 2, bias=False).requires_grad_(False)
    before = layer.weight.clone()
    FrozenUpdates([nn.Sequential(layer)], lr=0.5, sign=True)
    input = torch.tensor([[1.0, -3.0, 0.0]], requires_grad=True)
    layer(input).sum().backward()
    assert torch.equal(layer.weight, before - 0.5 * torch.tensor([[1.0, -1.0, 0.0]]))
