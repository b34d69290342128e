import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lisatune import AdamW, UserError, linear_cross_entropy
from lisatune.optim.row_gradients import EmbeddingPart, RowGradients, watch_embedding
from tiny import make_llama

IDS = torch.randint(0, 128, (3, 12), generator=torch.Generator().manual_seed(0))


class MadeOfSize(TorchDispatchMode):
    """How many tensors of ``num_elements`` or more were made, with memory of their own."""

    def __init__(self, num_elements):
        super().__init__()
        self.num_elements, self.count = num_elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        self.count += sum(
            t.numel() >= self.num_elements and t.untyped_storage().data_ptr() not in given
            for t in tree_leaves(out)
            if isinstance(t, torch.Tensor)
        )
        return out


def whole(store, p, rows):
    """All blocks of the gradient, one below the other."""
    return torch.cat([store.block(p, start, min(start + rows, len(p))) for start in range(0, len(p), rows)])


def loss_of(model, ids, store, chunk_tokens=8):
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
    return linear_cross_entropy(
        hidden,
        model.lm_head.weight,
        ids[:, 1:].flatten(),
        num_labelled=33,
        chunk_tokens=chunk_tokens,
        row_gradients=store,
    )


@given(
    num_tokens=st.integers(0, 60), vocabulary=st.integers(1, 40), rows=st.integers(1, 50), most=st.integers(1, 100),
    padded=st.booleans(), seed=st.integers(0, 2**32),
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_blocks_equal_the_dense_gradient(dtype, num_tokens, vocabulary, rows, most, padded, seed):
    """To the bit in float32; from bfloat16 gradients the sums are float32's, which no step rounded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
    weight = torch.randn(vocabulary, 5, generator=generator, requires_grad=True)
    grads = torch.randn(num_tokens, 5, generator=generator).to(dtype)
    padding_idx = vocabulary // 2 if padded else None
    F.embedding(ids, weight, padding_idx).backward(grads.float())
    store = RowGradients(block_elements=most)
    store.add(weight, EmbeddingPart(ids, grads, padding_idx))
    assert torch.equal(whole(store, weight, rows), weight.grad)


@given(
    num_tokens=st.integers(1, 40), vocabulary=st.integers(2, 50), rows=st.integers(1, 60), most=st.integers(1, 300),
    with_bias=st.booleans(), seed=st.integers(0, 2**32),
)  # fmt: skip
def test_head_blocks_equal_the_dense_gradient(num_tokens, vocabulary, rows, most, with_bias, seed):
    """To rounding, float32: other shapes of product, 1e-7 seen."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, 8, generator=generator)
    weight = torch.randn(vocabulary, 8, generator=generator, requires_grad=True)
    bias = torch.randn(vocabulary, generator=generator) if with_bias else None
    labels = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
    labels[::3] = -100
    store = RowGradients(block_elements=most)
    (3 * linear_cross_entropy(hidden, weight, labels, bias=bias, row_gradients=store)).backward()
    assert weight.grad is None
    (3 * linear_cross_entropy(hidden, weight, labels, bias=bias)).backward()
    # the sums are of float32 numbers of a few units, in another order; where they cancel, a few of their 1e-7 remain
    torch.testing.assert_close(whole(store, weight, rows), weight.grad, atol=1e-5, rtol=1e-5)


def test_head_blocks_in_bfloat16_are_nearer_the_truth_than_the_dense_gradient():
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(64, 16, generator=generator), torch.randn(100, 16, generator=generator)
    weight = head.bfloat16().requires_grad_()
    labels = torch.randint(0, 100, (64,), generator=generator)
    exact = weight.detach().float().requires_grad_()
    linear_cross_entropy(hidden.bfloat16().float(), exact, labels).backward()
    store = RowGradients()
    for part in range(4):  # four micro-batches: the dense gradient is rounded four times
        rows = slice(16 * part, 16 * part + 16)
        for into in (store, None):
            linear_cross_entropy(
                hidden[rows].bfloat16(), weight, labels[rows], num_labelled=64, row_gradients=into
            ).backward()
    errors = [(g.float() - exact.grad).norm() / exact.grad.norm() for g in (whole(store, weight, 7), weight.grad)]
    assert errors[0] < errors[1] < 0.02


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_leaves_the_gradient_that_it_would_have_had(tied, checkpointing):
    """Two micro-batches. Of the embedding to the bit when it stands alone; the head's to rounding (1e-7 seen)."""
    dense, model = (make_llama(tied=tied, layers=2).train() for _ in range(2))
    store = RowGradients(block_elements=640)
    watch_embedding(model.model.embed_tokens, store)
    for own, ids in ((None, IDS), (store, IDS), (None, IDS.flip(0, 1)), (store, IDS.flip(0, 1))):
        one = dense if own is None else model
        if checkpointing:
            one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss_of(one, ids, own).backward()
    for (name, p), q in zip(dense.named_parameters(), model.parameters(), strict=True):
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(p.grad, q.grad)
            continue
        assert q.grad is None
        blocks = whole(store, q, 20)
        if name.startswith("model") and not tied:
            assert torch.equal(blocks, p.grad)
        torch.testing.assert_close(blocks, p.grad, atol=1e-7, rtol=1e-5)
        torch.testing.assert_close(store.sq_norm(q), p.grad.square().sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_no_tensor_of_the_matrix_s_size_is_made_in_a_step(tied):
    """Counted from forward to the end of the update, clipping included; with dense gradients some are."""
    counts = {}
    for watched in (False, True):
        model = make_llama(tied=tied, layers=2, vocab_size=400)
        store = RowGradients(block_elements=2048)
        optimizer = AdamW(model.parameters(), row_gradients=store, block_elements=2048)
        if watched:
            watch_embedding(model.model.embed_tokens, store)
        for step in range(2):
            with MadeOfSize(400 * 32) as made:
                loss_of(model, IDS, store if watched else None).backward()
                for p in store.parameters():
                    store.sq_norm(p)
                if step:  # the first makes the state, whose tensors are of this size by right
                    optimizer.step()
            optimizer.step()
            optimizer.zero_grad()
        counts[watched] = made.count
    assert counts[True] == 0 < counts[False]


def test_clipping_by_the_global_norm_equals_dense_clipping():
    """Weights after 3 steps to rounding: Adam divides by roots of gradients, 1e-6 of steps of 1e-2 allowed."""
    dense, model = (make_llama(tied=True, layers=2) for _ in range(2))
    store = RowGradients(block_elements=1000)
    watch_embedding(model.model.embed_tokens, store)
    a = AdamW(dense.parameters(), lr=1e-2, eps=1e-4)
    b = AdamW(model.parameters(), lr=1e-2, eps=1e-4, row_gradients=store)
    for step in range(3):
        ids = IDS.roll(step, 0)
        loss_of(dense, ids, None).backward()
        loss_of(model, ids, store).backward()
        norm = nn.utils.clip_grad_norm_(dense.parameters(), 0.1)
        own = [p.grad for p in model.parameters() if p.grad is not None]
        total = sum([g.square().sum() for g in own] + [store.sq_norm(p) for p in store.parameters()]).sqrt()
        torch.testing.assert_close(total, norm, rtol=1e-5, atol=0)
        factor = (0.1 / (total + 1e-6)).clamp(max=1)
        assert factor < 0.5
        for g in own:
            g.mul_(factor)
        store.scale(factor)
        for optimizer in (a, b):
            optimizer.step()
            optimizer.zero_grad()
        assert not store.parameters()
    for p, q in zip(dense.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=0)


@pytest.mark.parametrize("state_bits", [32, 16, 8])
def test_updating_in_place_block_after_block_is_right(state_bits):
    """A block's gradient must not see the rows that were updated before it: any block size gives the same weights."""
    models = [make_llama(tied=True, layers=1) for _ in range(2)]
    for model, block_elements in zip(models, (256, 2**20), strict=True):
        store = RowGradients()
        watch_embedding(model.model.embed_tokens, store)
        options = {"lr": 0.5, "eps": 1.0, "row_gradients": store, "state_bits": state_bits}  # large steps, no division
        optimizer = AdamW(model.parameters(), **options, block_elements=block_elements)
        loss_of(model, IDS, store).backward()
        optimizer.step()
    torch.testing.assert_close(models[0].lm_head.weight, models[1].lm_head.weight, atol=1e-6, rtol=1e-5)


def test_dense_and_row_gradients_of_one_matrix_add_up():
    """A tied head whose loss is the model's own leaves a dense gradient beside the embedding's parts."""
    dense, model = (make_llama(tied=True, layers=1) for _ in range(2))
    store = RowGradients()
    watch_embedding(model.model.embed_tokens, store)
    optimizers = AdamW(dense.parameters(), eps=1e-4), AdamW(model.parameters(), eps=1e-4, row_gradients=store)
    for one, optimizer in zip((dense, model), optimizers, strict=True):
        one(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert store.parameters() == [model.lm_head.weight]
    assert model.lm_head.weight.grad is not None
    torch.testing.assert_close(dense.lm_head.weight, model.lm_head.weight, atol=1e-7, rtol=1e-6)


def test_a_frozen_embedding_leaves_nothing_and_a_thawed_one_does():
    embedding, store = nn.Embedding(10, 4), RowGradients()
    handle = watch_embedding(embedding, store)
    plain = F.embedding(IDS[0, :3] % 10, embedding.weight)
    for asks in (False, True, False, True):
        embedding.weight.requires_grad_(asks)
        out = embedding(IDS[0, :3] % 10)
        assert torch.equal(out, plain)
        assert out.requires_grad == asks
        with torch.no_grad():
            assert not embedding(IDS[0, :3] % 10).requires_grad
        if asks:
            out.sum().backward()
        assert (embedding.weight in store) == asks
        store.clear()
    handle.remove()
    embedding(torch.tensor([1])).sum().backward()
    assert embedding.weight.grad is not None
    assert embedding.weight not in store


def test_scale_waits_for_the_blocks_and_ends_with_clear():
    weight, store = torch.zeros(4, 2, requires_grad=True), RowGradients()
    for _ in range(2):
        store.add(weight, EmbeddingPart(torch.tensor([1]), torch.ones(1, 2)))
        store.scale(0.5)
        store.scale(torch.tensor(0.5))
        assert store.block(weight, 1, 2).tolist() == [[0.25, 0.25]]
        assert store.sq_norm(weight).item() == pytest.approx(0.125)
        store.clear()


def test_all_of_it_runs_on_meta():
    model = make_llama(tied=True, layers=2).to(device="meta", dtype=torch.bfloat16)
    store = RowGradients(block_elements=512)
    watch_embedding(model.model.embed_tokens, store)
    optimizer = AdamW(model.parameters(), row_gradients=store, state_bits=8, block_elements=512)
    loss_of(model, IDS.to("meta"), store).backward()
    weight = model.lm_head.weight
    assert weight.grad is None
    assert store.sq_norm(weight).is_meta
    store.scale(torch.ones((), device="meta"))
    block = store.block(weight, 8, 16)
    assert (block.shape, block.dtype) == ((8, 32), torch.float32)
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.state[weight]["exp_avg"].dtype == torch.int8
    assert not store.parameters()


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 2


def test_embeddings_that_do_more_are_refused():
    store = RowGradients()
    with pytest.raises(UserError, match="class Scaled, which has a forward of its own"):
        watch_embedding(Scaled(4, 2), store)
    replaced = nn.Embedding(4, 2)
    replaced.forward = lambda ids: replaced.weight[ids]
    for embedding in (replaced, nn.Linear(4, 2)):
        with pytest.raises(UserError, match="which has a forward of its own"):
            watch_embedding(embedding, store)
    for option in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}):
        with pytest.raises(UserError, match="max_norm, scale_grad_by_freq or sparse"):
            watch_embedding(nn.Embedding(4, 2, **option), store)
    embedding = nn.Embedding(4, 2)
    watch_embedding(embedding, store)
    with pytest.raises(UserError, match="watched already"):
        watch_embedding(embedding, store)
