import copy
from itertools import pairwise

import pytest
import torch

from lisatune import LisaEngine, UniformSampler, UserError, find_layers
from lisatune.memory.measure import state_bytes
from tiny import VOCABULARY, make_llama


def make_engine(model, num_active=2, interval_steps=1, seed=0, **options):
    layers = find_layers(model)
    return LisaEngine(layers, UniformSampler(len(layers.decoder), num_active, seed), interval_steps, **options)


def make_adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **options)


def batch(step):
    return torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(step))


def train_step(model, optimizer, step, engine=None):
    if engine is not None:
        engine.begin_step(step, optimizer)
    ids = batch(step)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def layer_of(name):
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def test_all_layers_active_equals_full_fine_tuning_to_the_bit():
    full, lisa = make_llama(), make_llama()
    full_optimizer, lisa_optimizer = make_adamw(full), make_adamw(lisa)
    engine = make_engine(lisa, num_active=4, interval_steps=2)
    for step in range(10):
        train_step(full, full_optimizer, step)
        train_step(lisa, lisa_optimizer, step, engine)
    for (name, a), b in zip(full.named_parameters(), lisa.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("fused", [False, True])
def test_over_100_switches_state_is_flat_and_each_layer_changes_only_while_active(fused):
    model = make_llama()
    optimizer = make_adamw(model, fused=fused)
    engine = make_engine(model)
    sizes, changed_layers = set(), set()
    before = weights(model)
    for step in range(101):
        train_step(model, optimizer, step, engine)
        after = weights(model)
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        always = {name for name in after if layer_of(name) is None}
        assert always <= changed
        assert {layer_of(name) for name in changed - always} == set(engine.active)
        assert engine.active == engine.sampler(step)
        changed_layers |= set(engine.active)
        sizes.add(state_bytes(optimizer))
        before = after
    assert len(sizes) == 1
    assert changed_layers == {0, 1, 2, 3}
    counted = 2 * 4 * engine.layers.num_trainable(engine.active)  # two float32 moments
    assert 0 < sizes.pop() - counted <= 4 * len(optimizer.state)  # and a step counter each


def test_frozen_layers_have_no_gradient_and_no_state(llama):
    optimizer, engine = make_adamw(llama), make_engine(llama, num_active=1)
    for step in range(20):
        engine.begin_step(step, optimizer)
        ids = batch(step)
        llama(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        for name, p in llama.named_parameters():
            active = layer_of(name) in (None, *engine.active)
            assert (p.grad is not None) == active == (p in optimizer.state) == p.requires_grad, name


def test_gradients_of_a_refrozen_layer_do_not_enter_the_clip_norm(llama):
    optimizer, engine = make_adamw(llama), make_engine(llama, num_active=1)
    engine.begin_step(0, optimizer)
    ids = batch(0)
    llama(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()  # and no zero_grad before the switch
    step = next(s for s in range(1, 50) if engine.active_at(s) != engine.active)
    engine.begin_step(step, optimizer)
    assert {layer_of(n) for n, p in llama.named_parameters() if p.grad is not None} <= {None, *engine.active}


@pytest.mark.parametrize("interval_steps", [1, 3, 20])
def test_first_set_lives_k_steps(llama, interval_steps):
    optimizer, engine = make_adamw(llama), make_engine(llama, num_active=1, interval_steps=interval_steps)
    switches = [step for step in range(4 * interval_steps) if engine.begin_step(step, optimizer)]
    assert switches == [0, interval_steps, 2 * interval_steps, 3 * interval_steps]


def test_trainable_count_equals_the_arithmetic():
    width, mlp, vocabulary, heads, kv_heads = 32, 64, VOCABULARY, 4, 2
    head_width = width // heads
    attention = 2 * width * width + 2 * width * kv_heads * head_width
    layer = attention + 3 * width * mlp + 2 * width
    for tied in (False, True):
        model = make_llama(tied=tied)
        optimizer, engine = make_adamw(model), make_engine(model, num_active=2)
        engine.begin_step(0, optimizer)
        expected = (1 if tied else 2) * vocabulary * width + width + 2 * layer
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
        assert engine.layers.num_trainable(engine.active) == expected


def test_layer_drawn_twice_running_keeps_its_state(llama):
    optimizer, engine = make_adamw(llama), make_engine(llama, num_active=3)
    for step in range(12):
        train_step(llama, optimizer, step, engine)
    for layer, module in enumerate(engine.layers.decoder):
        run = 0
        while layer in engine.active_at(11 - run):
            run += 1
        counters = {optimizer.state[p]["step"].item() for p in module.parameters() if p in optimizer.state}
        assert counters == ({run} if run else set())
    assert any(set(engine.active_at(s)) & set(engine.active_at(s + 1)) for s in range(11))


def test_reset_all_starts_every_parameter_afresh(llama):
    optimizer, engine = make_adamw(llama), make_engine(llama, interval_steps=3, state_policy="reset_all")
    for step in range(8):
        train_step(llama, optimizer, step, engine)
        assert {s["step"].item() for s in optimizer.state.values()} == {step % 3 + 1}


def test_keep_brings_the_state_back(llama):
    optimizer, engine = make_adamw(llama), make_engine(llama, num_active=1, state_policy="keep")
    for step in range(30):
        train_step(llama, optimizer, step, engine)
    for layer, module in enumerate(engine.layers.decoder):
        times = sum(layer in engine.active_at(s) for s in range(30))
        assert {optimizer.state[p]["step"].item() for p in module.parameters()} == {times}


def test_draw_and_state_survive_a_restart_in_mid_interval():
    """A new engine over a loaded optimizer takes up the set of its step, with the moments it had."""
    straight = make_llama()
    optimizer, engine = make_adamw(straight), make_engine(straight, interval_steps=3)
    for step in range(11):
        if step == 7:
            saved_weights = copy.deepcopy(straight.state_dict())
            saved_state = copy.deepcopy(optimizer.state_dict())
        train_step(straight, optimizer, step, engine)
    resumed = make_llama(seed=1)
    resumed.load_state_dict(saved_weights)
    optimizer = make_adamw(resumed)
    optimizer.load_state_dict(saved_state)
    engine = make_engine(resumed, interval_steps=3)
    for step in range(7, 11):
        train_step(resumed, optimizer, step, engine)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_checkpointing_gives_the_same_gradients_with_frozen_layers_at_the_bottom(checkpointing):
    def gradients(use_reentrant):
        model = make_llama()
        if use_reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.train()
        optimizer, engine = make_adamw(model), make_engine(model, num_active=1)
        step = next(s for s in range(99) if engine.active_at(s) == (3,))
        engine.begin_step(step, optimizer)
        ids = batch(0)
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(None), gradients(checkpointing)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_layer_1_is_not_layer_10():
    model = make_llama(layers=12)
    optimizer, engine = make_adamw(model), make_engine(model, num_active=1)
    step = next(s for s in range(999) if engine.active_at(s) == (1,))
    engine.begin_step(step, optimizer)
    trained = {layer_of(name) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {None, 1}


def test_optimizer_made_after_freezing_is_refused(llama):
    """The bug of most public versions: layers drawn later are not in the optimizer, and never train."""
    for p in llama.model.layers[2].parameters():
        p.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in llama.parameters() if p.requires_grad])
    with pytest.raises(UserError, match=r"does not hold model\.layers\.2\..* make the optimizer over"):
        make_engine(llama).begin_step(0, optimizer)


def test_same_seed_same_weights():
    def run():
        model = make_llama()
        optimizer, engine = make_adamw(model), make_engine(model)
        for step in range(6):
            train_step(model, optimizer, step, engine)
        return weights(model)

    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_refusals(llama):
    with pytest.raises(UserError, match="interval_steps is 0"):
        make_engine(llama, interval_steps=0)
    with pytest.raises(UserError, match="choose one of reset_layers, reset_all, keep"):
        make_engine(llama, state_policy="drop")
    with pytest.raises(UserError, match="make it with num_layers=4"):
        LisaEngine(find_layers(llama), UniformSampler(5, 2))


def test_cost_of_begin_step_between_switches_is_one_comparison(llama):
    """Counted, not timed: nothing of the model is looked at."""
    optimizer, engine = make_adamw(llama), make_engine(llama, interval_steps=100)
    engine.begin_step(0, optimizer)
    engine.layers = None
    assert not any(engine.begin_step(step, optimizer) for step in range(1, 100))


def test_sets_change_over_time(llama):
    engine = make_engine(llama)
    assert any(a != b for a, b in pairwise(engine.active_at(s) for s in range(9)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_the_embedding_frozen_nothing_below_the_lowest_active_layer_is_differentiated(checkpointing):
    """Counted: how many decoder layers a gradient passes through."""
    model = make_llama()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()
    model.train()
    passed = []

    def watch(number):
        def hook(_module, _args, out):
            if out.requires_grad:
                out.register_hook(lambda _grad: passed.append(number))

        return hook

    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(watch(number))
    for train_embedding in (False, True):
        optimizer = make_adamw(model)
        engine = make_engine(model, num_active=1, train_embedding=train_embedding)
        for step in range(10):
            passed.clear()
            train_step(model, optimizer, step, engine)
            lowest = 0 if train_embedding else engine.active[0]
            assert sorted(set(passed)) == list(range(lowest, 4))


@pytest.mark.parametrize(("train_embedding", "train_head"), [(False, True), (True, False), (False, False)])
def test_frozen_embedding_and_head_keep_their_bytes_and_hold_nothing(llama, train_embedding, train_head):
    optimizer = make_adamw(llama)
    engine = make_engine(llama, train_embedding=train_embedding, train_head=train_head)
    before = weights(llama)
    for step in range(6):
        train_step(llama, optimizer, step, engine)
    for name, trained in [("model.embed_tokens.weight", train_embedding), ("lm_head.weight", train_head)]:
        parameter = llama.get_parameter(name)
        assert torch.equal(before[name], parameter) != trained
        assert (parameter in optimizer.state) == trained
    counted = engine.layers.num_trainable(engine.active, train_embedding=train_embedding, train_head=train_head)
    assert sum(p.numel() for p in llama.parameters() if p.requires_grad) == counted


def test_tied_embedding_and_head_are_frozen_together():
    model = make_llama(tied=True)
    with pytest.raises(UserError, match="embedding and head are one tensor in this model"):
        make_engine(model, train_head=False)
    optimizer, engine = make_adamw(model), make_engine(model, train_embedding=False, train_head=False)
    engine.begin_step(0, optimizer)
    assert not model.lm_head.weight.requires_grad
