"""Frozen layers in few bits: what trains is exact, and what is saved."""

import copy
import weakref

import pytest
import torch

from lisatune import LisaEngine, UniformSampler, find_layers, plan_memory
from lisatune.assemble import make_learner
from lisatune.data.loader import Batch
from lisatune.levers.gradient_checkpointing import checkpoint_layers
from lisatune.levers.offload_frozen import HostLayers
from lisatune.memory.blocks import Cut
from lisatune.memory.few_bits import few_bits
from lisatune.plan.forecast import plan_config
from tiny import VOCABULARY, make_llama

CPU = torch.device("cpu")


def batch(step):
    return torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(step))


def coarse(model, layers, active, bits):
    """Puts what few bits leave of them in place of frozen matrices, and returns the exact ones."""
    exact = {}
    for number, layer in enumerate(layers.decoder):
        for p in layer.parameters():
            if number not in active and p.ndim > 1:
                exact[p] = p.data
                small = few_bits(p.data, bits)
                p.data = small.restore(small.tensors)
    return exact


def trained(bits, *, stream=False, slow=False):
    """Eight steps with a switch after every second; what came of the held-out loss of the exact model each time."""
    model = make_llama()
    layers = find_layers(model)
    checkpoint_layers(layers.decoder)
    host_layers = None if slow else HostLayers(layers.decoder, CPU, bits=bits, stream=stream)
    engine = LisaEngine(layers, UniformSampler(len(layers.decoder), 1, seed=0), interval_steps=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for step in range(8):
        switched = engine.begin_step(step, optimizer)
        if switched and host_layers:
            host_layers.place()
        model.train()
        exact = coarse(model, layers, engine.active, bits) if slow else {}
        ids = batch(step)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for p, data in exact.items():
            p.data = data
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            losses.append(model(input_ids=batch(99), labels=batch(99), use_cache=False).loss.item())
    if host_layers:
        host_layers.remove(CPU)
    return losses, copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_the_plain_loop_that_replaces_frozen_matrices(bits, stream):
    """To the bit, evaluations of the exact model between the steps too."""
    ours, theirs = trained(bits, stream=stream), trained(bits, slow=True)
    assert ours[0] == theirs[0]
    assert all(torch.equal(a, b) for a, b in zip(ours[1].values(), theirs[1].values(), strict=True))


def test_few_bits_change_what_is_computed():
    """Else the test above would show nothing."""
    losses = {bits: trained(bits)[0] for bits in (4, 8)}
    assert losses[4] != losses[8]


def coarse_rows(engine, bits):
    """The same with slices: trained rows stay exact, and the whole weight that a slot is a view of is put back later."""
    exact = {}
    for name, cut in engine.cuts.items():
        if ".layers." in name and cut.weight.ndim > 1:
            exact[cut] = cut.weight.detach().clone()
            small = few_bits(cut.weight, bits)
            rough = small.restore(small.tensors).view(cut.shape)
            for start, stop in cut.ranges:
                rough[start:stop] = cut.weight.detach().view(cut.shape)[start:stop]
            cut.weight.detach().view(cut.shape).copy_(rough)
    return exact


def trained_in_slices(bits, *, slow=False, **settings):
    """Eight steps of slices, of 32 and 88 rows in 5 blocks, so that blocks share scales of 4 bits."""
    plain = {} if slow else {"frozen_bits": bits} | settings
    learner = learner_of(
        recipe=None,
        sampled_unit="slices",
        slices_of="rows",
        num_slices=5,
        num_active=2,
        interval_steps=2,
        train_norms="sampled",
        **plain,
    )
    losses = []
    for step in range(8):
        learner.model.train()
        if slow:
            learner.method.begin_step(step, learner.optimizer)
            exact = coarse_rows(learner.engine, bits)
            ids = batch(step)
            learner.backward([of(ids)], of(ids).num_labelled)
            for cut, weight in exact.items():
                cut.weight.detach().copy_(weight)
            learner.update(bad=False)
            learner.optimizer.zero_grad()
        else:
            learner.step(step, [of(batch(step))], of(batch(step)).num_labelled)
        learner.model.eval()
        with torch.no_grad():
            losses.append(learner.model(input_ids=batch(99), labels=batch(99), use_cache=False).loss.item())
    return losses, copy.deepcopy(learner.model.state_dict()), learner


def of(ids):
    return Batch(ids, ids.roll(-1, 1), torch.arange(ids.shape[1]).repeat(len(ids), 1), torch.ones_like(ids).bool())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_with_slices_it_is_the_plain_loop_that_replaces_frozen_rows(bits, stream):
    """To the bit; and the copies in few bits, of which a few rows are made anew after each step, are those of the whole."""
    ours, theirs = trained_in_slices(bits, offload_frozen=stream), trained_in_slices(bits, slow=True)
    assert ours[0] == theirs[0]
    assert all(torch.equal(a, b) for a, b in zip(ours[1].values(), theirs[1].values(), strict=True))
    small = ours[2].placement.host_layers._small
    assert len(small) == 7 * 4
    for weight, held in small.items():
        assert all(torch.equal(a, b) for a, b in zip(held.tensors, few_bits(weight, bits).tensors, strict=True))


def test_trained_rows_are_computed_exactly():
    """With every row in a trained slice, few bits change nothing."""
    every = {"recipe": None, "sampled_unit": "slices", "slices_of": "rows", "num_slices": 3, "num_active": 3}
    weights = []
    for bits in ({}, {"frozen_bits": 4}):
        learner = learner_of(**every, **bits)
        for step in range(3):
            learner.step(step, [of(batch(step))], of(batch(step)).num_labelled)
        weights.append(learner.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))


def learner_of(**settings):
    config = plan_config(
        {"model": "m", "method": "lisa", "recipe": "paper", "num_active": 1, "interval_steps": 1, "max_grad_norm": 0.0,
         "gradient_checkpointing": True, "learning_rate": 1e-2, "dtype": "float32"} | settings, "cuda",
    )  # fmt: skip
    return make_learner(config, make_llama(), CPU)


@pytest.mark.parametrize("bits", [4, 8])
def test_frozen_layers_keep_their_exact_bits(bits):
    learner = learner_of(frozen_bits=bits)
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    learner.engine.begin_step(0, learner.optimizer)
    learner.after_switch()
    frozen = {name for name, p in learner.model.named_parameters() if not p.requires_grad}
    assert any(name.endswith("up_proj.weight") for name in frozen)
    ids = batch(0)
    learner.model.train()
    learner.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    learner.optimizer.step()
    for name, p in learner.model.named_parameters():
        assert torch.equal(p.detach(), before[name]) == (name in frozen), name


def test_the_card_holds_frozen_layers_in_few_bits():
    """By the forecast: 0.5625 and a little over 1 byte for each weight of a frozen matrix, in place of 2."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4
    )
    options = {"recipe": "paper", "num_active": 1, "gradient_checkpointing": True, "max_length": 8}
    plans = {bits: plan_memory(config, frozen_bits=bits, **options) for bits in (None, 8, 4)}
    matrices = 7 * (4 * 256 * 256 + 3 * 256 * 512)
    held = {bits: plan.bytes_of["weights/decoder"] for bits, plan in plans.items()}
    assert held[None] - held[8] == pytest.approx(matrices * 1.0, rel=0.02)  # and 4 bytes a row
    assert held[None] - held[4] == pytest.approx(matrices * 1.4375, rel=0.01)
    assert plans[None].host_bytes == 0
    assert plans[4].host_bytes == pytest.approx(matrices * 2 * 8 / 7, rel=0.01), "at a switch, all layers for a moment"


@pytest.mark.parametrize("lever", [{"frozen_bits": 8}, {"offload_frozen": True}], ids=lambda lever: next(iter(lever)))
def test_with_slices_the_backward_pass_holds_no_copy_of_a_layer(monkeypatch, lever):
    """A slice's gradient needs to know of its matrix, and must not keep the copy that computed."""
    learner = learner_of(recipe=None, sampled_unit="slices", slices_of="rows", num_slices=5, num_active=1, **lever)
    copies = []
    in_copy = Cut.in_copy

    def watched(cut, weight):
        copies.append(weakref.ref(weight.untyped_storage()))
        return in_copy(cut, weight)

    monkeypatch.setattr(Cut, "in_copy", watched)
    learner.model.train()
    learner.method.begin_step(0, learner.optimizer)
    ids = batch(0)
    loss = learner.model(input_ids=ids, labels=ids, use_cache=False).loss
    assert len(copies) == 7 * 4
    assert not any(copy() is not None for copy in copies)
    loss.backward()
    assert len(copies) == 2 * 7 * 4
    assert not any(copy() is not None for copy in copies)
