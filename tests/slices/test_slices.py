"""Slices: blocks of rows or columns of every matrix, views of the weights, and nothing else that trains."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kinds import make_gemma, make_gpt2, make_mixtral
from lisatune import UniformSampler, UserError, find_layers
from lisatune.loss import linear_cross_entropy
from lisatune.memory.blocks import Cut, block_range
from lisatune.memory.measure import state_bytes
from lisatune.optim import make_optimizer
from lisatune.samplers.bernoulli import BernoulliSampler
from lisatune.samplers.fixed import FixedSampler
from lisatune.samplers.sweep import SweepSampler
from lisatune.slices.engine import SliceEngine
from lisatune.slices.functions import sliced_linear
from lisatune.slices.modules import SlicedForward
from tiny import VOCABULARY, make_llama

MODELS = {
    "gemma": make_gemma,
    "llama": make_llama,
    "tied llama": lambda: make_llama(tied=True),
    "llama with biases": lambda: make_llama(attention_bias=True, mlp_bias=True),
    "gpt2": make_gpt2,
    "mixtral": make_mixtral,
}


def batch(step):
    return torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(step))


def make(model, num_slices=5, num_active=1, interval_steps=1, seed=0, lr=1e-2, sampler=None, fused=False, **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1, fused=fused)
    sampler = sampler or SweepSampler(num_slices, num_active, seed)
    return SliceEngine(find_layers(model), sampler, interval_steps, **options), optimizer


def train_step(model, optimizer, step, engine=None):
    if engine is not None:
        engine.begin_step(step, optimizer)
    ids = batch(step)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def weights(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


@given(st.integers(0, 1000), st.integers(1, 70))
def test_blocks_cover_the_rows_once_and_differ_by_one_row_at_most(num_rows, num_slices):
    blocks = [block_range(num_rows, num_slices, block) for block in range(num_slices)]
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(num_rows))
    sizes = {stop - start for start, stop in blocks}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("fused", "slices_of"), [(False, "rows"), (True, "rows"), (False, "columns")])
@pytest.mark.parametrize("name", MODELS)
def test_one_slice_is_full_fine_tuning_to_the_bit(name, fused, slices_of):
    full, sliced = MODELS[name](), MODELS[name]()
    full_optimizer = torch.optim.AdamW(full.parameters(), lr=1e-2, weight_decay=0.1, fused=fused)
    engine, optimizer = make(sliced, num_slices=1, fused=fused, train_norms=True, slices_of=slices_of)
    for step in range(6):
        train_step(full, full_optimizer, step)
        train_step(sliced, optimizer, step, engine)
    for (n, a), b in zip(full.state_dict().items(), sliced.state_dict().values(), strict=True):
        assert torch.equal(a, b), n


@pytest.mark.parametrize("slices_of", ["rows", "columns"])
@pytest.mark.parametrize("num_active", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_blocks_are_those_of_the_whole_gradient_with_the_rest_thrown_away(name, num_active, slices_of):
    fast, slow, whole = MODELS[name](), MODELS[name](), MODELS[name]()
    engines = []
    for model, option in ((fast, False), (slow, True)):
        engine, optimizer = make(
            model, num_active=num_active, slow=option, train_norms="sampled" if num_active == 1 else False,
            slices_of=slices_of,
        )  # fmt: skip
        engine.begin_step(3, optimizer)
        engines.append(engine)
    for model in (fast, slow, whole):
        model(input_ids=batch(0), labels=batch(0)).loss.backward()
    grads = dict(whole.named_parameters())
    for n, cut in engines[0].cuts.items():
        assert cut.dim == (
            slices_of == "columns" and ".layers." in n.replace(".h.", ".layers.") and cut.weight.ndim > 1
        )
        for slot, other, (start, stop) in zip(cut.slots, engines[1].cuts[n].slots, cut.ranges, strict=True):
            if not slot.requires_grad:
                continue
            whole_grad = grads[n].grad.view(cut.shape)
            expected = whole_grad[:, start:stop] if cut.dim else whole_grad[start:stop]
            assert torch.equal(other.grad, expected), n
            assert slot.grad.shape == expected.shape
            # a product of fewer rows may be summed in another order: 8 terms of 32 here
            torch.testing.assert_close(slot.grad, expected, rtol=1e-5, atol=1e-7)
    assert all(p.grad is None for cut in engines[0].cuts.values() for p in [cut.weight])


@pytest.mark.parametrize("slices_of", ["rows", "columns"])
@pytest.mark.parametrize("name", MODELS)
def test_over_many_switches_state_is_flat_and_exactly_the_active_blocks_change(name, slices_of):
    model = MODELS[name]()
    engine, optimizer = make(model, num_slices=4, train_norms="sampled", slices_of=slices_of)
    sizes, before, turns = set(), weights(model), {}
    for step in range(12):
        train_step(model, optimizer, step, engine)
        after, changed = weights(model), 0
        for n, cut in engine.cuts.items():
            ((start, stop),) = cut.ranges
            moved = (after[n] != before[n]).view(cut.shape)
            moved = moved.T if cut.dim else moved
            assert not moved[:start].any(), n
            assert not moved[stop:].any(), n
            changed += moved[start:stop].numel()
            turns.setdefault(n, []).append(cut.blocks[0])
        assert changed == engine.num_trainable() == sum(p.numel() for p in model.parameters() if p.requires_grad)
        sizes.add(state_bytes(optimizer))
        before = after
    for n, blocks in turns.items():
        for first in (0, 4, 8):
            assert sorted(blocks[first : first + 4]) == [0, 1, 2, 3], n
    assert len({tuple(blocks) for blocks in turns.values()}) > 1  # each tensor has an order of its own
    assert max(sizes) - min(sizes) <= 0.02 * max(sizes)  # rows that do not go evenly into blocks


def test_state_lives_for_the_interval_and_keep_brings_it_back():
    model = make_llama()
    engine, optimizer = make(model, num_slices=3, interval_steps=2, state_policy="keep")
    cut = next(iter(engine.cuts.values()))
    held = {}
    for step in range(12):
        engine.begin_step(step, optimizer)
        (block,) = cut.blocks
        if step % 2 == 0 and step >= 6:
            assert optimizer.state[cut.slots[0]]["step"] == 2
            assert torch.equal(optimizer.state[cut.slots[0]]["exp_avg"], held[block])
        ids = batch(step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        held[block] = optimizer.state[cut.slots[0]]["exp_avg"].clone()


def test_a_block_drawn_twice_running_keeps_its_state():
    model = make_llama()
    engine, optimizer = make(model, sampler=FixedSampler(4, (1, 2)))
    for step in range(3):
        train_step(model, optimizer, step, engine)
    slot = next(iter(engine.cuts.values())).slots[0]
    assert optimizer.state[slot]["step"] == 3


def test_parameters_of_the_model_have_the_slices_and_its_state_dict_has_not():
    model, plain = make_llama(tied=True), make_llama(tied=True)
    engine, optimizer = make(model)
    engine.begin_step(0, optimizer)
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.load_state_dict(plain.state_dict())
    mine = {id(p) for p in model.parameters()}
    assert all(id(slot) in mine for cut in engine.cuts.values() for slot in cut.slots)
    names = {n for own in engine.layers.parts().values() for n in own}
    assert names == {n for n, _ in plain.named_parameters()}
    assert not engine.layers.parts()["outside"]


def test_release_gives_the_model_back_and_another_engine_may_begin():
    model, plain = make_llama(tied=True), make_llama(tied=True)
    engine, optimizer = make(model)
    for step in range(3):
        train_step(model, optimizer, step, engine)
    engine.release()
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert all(p.requires_grad for p in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    again, optimizer = make(model, num_slices=2)
    train_step(model, optimizer, 0, again)
    assert len(next(iter(again.cuts.values())).slots[0]) == VOCABULARY // 2


def test_several_optimizers_share_the_slices():
    model, plain = make_llama(), make_llama()
    groups = [[p for p in model.parameters() if (p.ndim > 1) == matrices] for matrices in (True, False)]
    optimizers = [torch.optim.SGD(groups[0], lr=0.1), torch.optim.SGD(groups[1], lr=0.1)]
    engine = SliceEngine(find_layers(model), SweepSampler(3, 1), train_norms=True)
    single = SliceEngine(find_layers(plain), SweepSampler(3, 1), train_norms=True)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(4):
        engine.begin_step(step, optimizers)
        model(input_ids=batch(step), labels=batch(step)).loss.backward()
        for one in optimizers:
            one.step()
            one.zero_grad()
        train_step(plain, optimizer, step, single)
    assert all(torch.equal(a, b) for a, b in zip(weights(model).values(), weights(plain).values(), strict=True))


def test_a_module_s_own_forward_gets_gradients_of_its_trained_rows_alone():
    embedding = make_gemma().model.embed_tokens
    cut = Cut("embedding", embedding.weight, num_slices=4, num_active=1)
    cut.place([2])
    forward = SlicedForward(embedding)
    assert forward.kind is None  # it is no plain nn.Embedding
    out = forward(torch.arange(10))
    assert out.grad_fn.next_functions[0][0].name() == "_EmbeddingBackward"
    assert torch.equal(out, embedding(torch.arange(10)))
    assert type(out) is torch.Tensor


@pytest.mark.parametrize("of", ["rows", "columns"])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_an_embedding_gets_gradients_of_its_trained_blocks_alone(of, padding_idx):
    whole = torch.nn.Embedding(20, 8, padding_idx=padding_idx)
    sliced = copy.deepcopy(whole)
    cut = Cut("embedding", sliced.weight, num_slices=3, num_active=2, of=of)
    cut.place([2, 0])
    ids, scale = torch.randint(0, 20, (4, 9)), torch.randn(4, 9, 8)
    (whole(ids) * scale).sum().backward()
    (SlicedForward(sliced)(ids) * scale).sum().backward()
    for slot, (start, stop) in zip(cut.slots, cut.ranges, strict=True):
        expected = whole.weight.grad[start:stop] if of == "rows" else whole.weight.grad[:, start:stop]
        assert torch.equal(slot.grad, expected)


def test_of_columns_only_their_share_of_the_input_is_kept():
    torch.manual_seed(0)
    linear, kept = torch.nn.Linear(40, 6), []
    cut = Cut("weight", linear.weight, num_slices=4, num_active=1, of="columns")
    cut.place([1])
    inputs = torch.randn(5, 40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sliced_linear(inputs * 1, cut, linear.bias)
    sizes = sorted(t.untyped_storage().nbytes() for t in kept)
    assert sizes == [5 * 10 * 4, 6 * 40 * 4]  # a quarter of the input, and the weight


@pytest.mark.parametrize(
    "name", ["adamw", "adamw_8bit", "sign", "spectral", "sgd", "lars", "lamb", "adafactor", "muon"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_does_to_columns_what_it_does_to_a_matrix_of_them(name, dtype):
    """Columns lie apart in memory; whoever takes them for contiguous writes to others."""
    torch.manual_seed(0)
    columns = torch.nn.Parameter(torch.randn(300, 12, dtype=dtype))
    cut = Cut("weight", columns, num_slices=3, num_active=1, of="columns")
    cut.place([0])
    alone = torch.nn.Parameter(columns.detach()[:, :4].clone())
    frozen = columns.detach()[:, 4:].clone()
    for whole, parameter in ((columns, cut.slots[0]), (alone, alone)):
        torch.manual_seed(1)
        stateless = {"stateless": True, "spectral": name == "spectral"} if name in ("sign", "spectral") else {}
        group = {"params": [whole], "weight_decay": 0.1, **stateless}
        optimizer = make_optimizer(name, [group], lr=0.1, betas=(0.9, 0.99), eps=1e-8, seed=0, ours=True)
        optimizer.param_groups[0]["params"][:] = [parameter]
        for _ in range(3):
            parameter.grad = torch.randn(300, 4).to(dtype)
            optimizer.step()
    tolerance = 2**-22 if name == "adafactor" else 0  # it sums the norms of columns in another order
    torch.testing.assert_close(columns[:, :4], alone, rtol=tolerance, atol=tolerance)
    assert torch.equal(columns[:, 4:], frozen)


def test_an_optimizer_that_takes_columns_for_contiguous_is_refused():
    class Foreign(torch.optim.SGD):
        pass

    for make_one, name in (
        (partial(torch.optim.AdamW, fused=True), "fused AdamW"),
        (partial(Foreign, lr=1), "Foreign"),
    ):
        model = make_llama()
        engine = SliceEngine(find_layers(model), SweepSampler(3, 1), slices_of="columns")
        with pytest.raises(UserError, match=f"^{name} may take the columns of a matrix for contiguous"):
            engine.begin_step(0, make_one(model.parameters()))
    with pytest.raises(UserError, match="slices_of is 'cells': choose one of rows, columns"):
        SliceEngine(find_layers(make_llama()), SweepSampler(3, 1), slices_of="cells")


def test_a_graph_that_is_still_held_does_not_fix_the_number_of_rows():
    model = make_llama()
    engine, optimizer = make(model, num_slices=5)
    losses, sizes = [], set()
    for step in range(10):
        engine.begin_step(step, optimizer)
        losses.append(model(input_ids=batch(step), labels=batch(step)).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
        sizes |= {len(cut.slots[0]) for cut in engine.cuts.values() if len(cut.weight) == 32}
    assert sizes == {6, 7}


def test_a_move_of_the_model_is_followed():
    model = make_llama()
    engine, optimizer = make(model, interval_steps=10)
    engine.begin_step(0, optimizer)
    model.double()
    assert engine.begin_step(1, optimizer)
    for cut in engine.cuts.values():
        assert cut.slots[0].untyped_storage().data_ptr() == cut.weight.untyped_storage().data_ptr()


def test_mistakes_are_refused():
    model = make_llama()
    layers = find_layers(model)
    with pytest.raises(UserError, match="BernoulliSampler cannot sample slices"):
        SliceEngine(layers, BernoulliSampler(4, 0.5))
    with pytest.raises(UserError, match="choose at least 1"):
        SliceEngine(layers, UniformSampler(4, 1), 0)
    engine, _ = make(model)
    with pytest.raises(UserError, match=r"does not hold .* before anything is frozen"):
        engine.begin_step(0, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]))
    engine, optimizer = make(model)
    engine.begin_step(0, optimizer)
    with pytest.raises(UserError, match="train already"):
        make(model)
    with pytest.raises(UserError, match="LBFGS"):
        engine.begin_step(1, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(UserError, match="the same value"):
        SliceEngine(find_layers(make_llama(tied=True)), UniformSampler(4, 1), train_head=False)


@pytest.mark.parametrize("of", ["rows", "columns"])
def test_the_loss_in_chunks_makes_gradients_of_the_trained_blocks_of_the_head_alone(of):
    torch.manual_seed(0)
    hidden, labels = torch.randn(20, 8, requires_grad=True), torch.randint(0, 50, (20,))
    whole = torch.nn.Parameter(torch.randn(50, 8))
    cut = Cut("head", torch.nn.Parameter(whole.detach().clone()), num_slices=4, num_active=2, of=of)
    cut.place([3, 1])
    loss = linear_cross_entropy(hidden, whole, labels, chunk_tokens=7)
    (3 * loss).backward()
    grad_hidden, hidden.grad = hidden.grad, None
    sliced = linear_cross_entropy(hidden, cut.weight, labels, chunk_tokens=7, cut=cut)
    (3 * sliced).backward()
    assert torch.equal(sliced, loss)
    assert torch.equal(hidden.grad, grad_hidden)
    assert cut.weight.grad is None
    for slot, (start, stop) in zip(cut.slots, cut.ranges, strict=True):
        expected = whole.grad[start:stop] if of == "rows" else whole.grad[:, start:stop]
        torch.testing.assert_close(slot.grad, expected, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, cut.weight, labels, cut=cut).requires_grad
