from array import array

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lisatune import UserError, linear_cross_entropy
from lisatune import loss as cross_entropy
from lisatune.memory.ledger import Ledger
from lisatune.optim.row_gradients import RowGradients


def plain(hidden, weight, labels, bias, divisor):
    logits = F.linear(hidden, weight, bias).float()
    return F.cross_entropy(logits, labels, reduction="sum") / divisor


@given(st.integers(1, 40), st.integers(1, 50), st.booleans(), st.integers(0, 2**20))
def test_loss_and_gradients_equal_the_plain_ones(num_tokens, chunk_tokens, with_bias, seed):
    """To rounding, float32: 2e-8 seen, 1e-6 allowed."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, 8, generator=generator, requires_grad=True)
    weight = torch.randn(30, 8, generator=generator, requires_grad=True)
    bias = torch.randn(30, generator=generator, requires_grad=True) if with_bias else None
    labels = torch.randint(-1, 30, (num_tokens,), generator=generator)
    labels[labels < 0] = -100
    divisor = max(1, int((labels >= 0).sum()))
    inputs = [t for t in (hidden, weight, bias) if t is not None]
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, chunk_tokens=chunk_tokens)
    expected = plain(hidden, weight, labels, bias, divisor)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(loss * 3, inputs), torch.autograd.grad(expected * 3, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("in_blocks", [False, True])
def test_weights_scale_each_token_s_loss(in_blocks):
    """As the plain weighted sum, to rounding of float32 sums of 30 terms: 1e-6."""
    hidden, weight = torch.randn(12, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    labels, weights = torch.arange(12), torch.rand(12)
    labels[3] = -100
    store = RowGradients() if in_blocks else None
    loss = linear_cross_entropy(hidden, weight, labels, weights=weights, chunk_tokens=5, row_gradients=store)
    losses = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    expected = (losses * weights).sum() / 11
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    wanted = torch.autograd.grad(expected, [hidden, weight])
    loss.backward()
    torch.testing.assert_close(hidden.grad, wanted[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(store.block(weight, 0, 30) if store else weight.grad, wanted[1], atol=1e-6, rtol=1e-5)
    ones = linear_cross_entropy(hidden, weight, labels, weights=torch.ones(12))
    assert torch.equal(ones, linear_cross_entropy(hidden, weight, labels))


def test_the_divisor_is_the_whole_steps():
    hidden, weight, labels = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6)
    parts = [linear_cross_entropy(hidden[i : i + 2], weight, labels[i : i + 2], num_labelled=6) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), F.cross_entropy(hidden @ weight.T, labels))


def test_frozen_head_gets_no_gradient_made(monkeypatch):
    """Counted: with a frozen head, no buffer of the head's shape is ever asked for."""
    made = []
    zeros_like = torch.zeros_like
    monkeypatch.setattr(cross_entropy.torch, "zeros_like", lambda t, **k: made.append(t.shape) or zeros_like(t, **k))
    hidden, labels = torch.randn(6, 4, requires_grad=True), torch.arange(6)
    for trained in (False, True):
        weight = torch.randn(9, 4, requires_grad=trained)
        linear_cross_entropy(hidden, weight, labels).backward()
        assert (weight.grad is not None) == trained == bool(made)


def test_nothing_labelled_is_zero():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.full((3,), -100))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_mismatched_lengths_are_refused():
    with pytest.raises(ValueError, match="hidden has 3 tokens"):
        linear_cross_entropy(torch.randn(3, 4), torch.randn(9, 4), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_trains", [False, True])
def test_row_gradients_change_nothing_but_the_weight_s(dtype, head_trains):
    """Loss, and gradients of hidden states and bias, to the bit; a frozen head leaves no part."""
    found = []
    labels = torch.arange(12) % 9
    labels[::5] = -100
    for store in (None, RowGradients()):
        torch.manual_seed(0)
        hidden, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((12, 4), (9, 4), (9,)))
        hidden.requires_grad_()
        bias.requires_grad_()
        weight.requires_grad_(head_trains)
        loss = linear_cross_entropy(hidden, weight, labels, bias=bias, chunk_tokens=5, row_gradients=store)
        (2 * loss).backward()
        found.append((loss, hidden.grad, bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert weight.grad is None
    assert (weight in store) == head_trains


def test_no_part_is_left_before_backward_or_without_gradients():
    hidden, weight, labels = torch.randn(3, 4), torch.randn(9, 4, requires_grad=True), torch.arange(3)
    store = RowGradients()
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, labels, row_gradients=store)
    loss = linear_cross_entropy(hidden, weight, labels, row_gradients=store)
    assert weight not in store
    loss.backward()
    assert weight in store


def test_the_bias_is_as_it_was_in_the_forward_pass():
    """The optimizer may update it before it comes to the weight."""
    hidden, weight, labels = torch.randn(6, 4), torch.randn(9, 4, requires_grad=True), torch.arange(6)
    bias, store = torch.randn(9, requires_grad=True), RowGradients()
    linear_cross_entropy(hidden, weight, labels, bias=bias, row_gradients=store).backward()
    before = store.block(weight, 2, 7)
    bias.data.add_(1)
    assert torch.equal(store.block(weight, 2, 7), before)


class LargestMade(TorchDispatchMode):
    """Elements of the largest tensor that an operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest] + [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)])
        return out


def test_logits_of_all_tokens_never_exist():
    """64 tokens of width 2, 301 entries, chunks of 8: 8 * 301 is the most, in the blocks too, whose size is bounded."""
    hidden, weight = torch.randn(64, 2, requires_grad=True), torch.randn(301, 2, requires_grad=True)
    labels, store = torch.randint(0, 301, (64,)), RowGradients(block_elements=8 * 301)
    with LargestMade() as made:
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=8, row_gradients=store).backward()
        for start in (0, 200):
            store.block(weight, start, min(start + 200, 301))
    assert made.largest == 8 * 301


@pytest.mark.parametrize("store", [None, RowGradients()])
def test_on_meta_all_tokens_count_as_labelled(store):
    hidden = torch.empty(6, 4, device="meta", requires_grad=True)
    weight = torch.empty(9, 4, device="meta", requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.empty(6, device="meta", dtype=torch.int64), row_gradients=store)
    loss.backward()
    assert hidden.grad.shape == (6, 4)
    if store is None:
        assert weight.grad.shape == (9, 4)
    else:
        assert store.block(weight, 0, 4).shape == (4, 4)


def test_row_gradients_of_a_computed_weight_are_refused():
    weight = torch.randn(9, 4, requires_grad=True)
    with pytest.raises(UserError, match="computed from other tensors"):
        linear_cross_entropy(torch.randn(3, 4), weight * 2, torch.arange(3), row_gradients=RowGradients())


@pytest.mark.parametrize("linear_head", [True, False])
def test_a_mixture_has_the_loss_of_transformers_with_that_of_its_routers(linear_head):
    """To rounding of a mean of 22 float32 terms: 1e-6. Held-out loss, in evaluation mode, is cross-entropy alone."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from lisatune.data.loader import collate
    from lisatune.data.tokenize import Encoded
    from lisatune.layers import find_layers
    from lisatune.loss import batch_loss

    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5,
        )
    )  # fmt: skip
    ids = [torch.arange(5, 17).tolist(), torch.arange(20, 30).tolist()]
    batch = collate([[Encoded(array("i", row), array("i", row))] for row in ids], 0)
    mask = batch.is_token.long()
    labels = batch.input_ids.masked_fill(mask == 0, -100)
    layers = find_layers(model)
    model.train()
    expected = model(input_ids=batch.input_ids, attention_mask=mask, labels=labels)
    loss = batch_loss(layers, batch, batch.num_labelled, linear_head=linear_head)
    torch.testing.assert_close(loss, expected.loss, atol=1e-6, rtol=1e-6)
    halves = [batch_loss(layers, half, batch.num_labelled, linear_head=linear_head) for half in batch.split(1)]
    assert abs((sum(halves) - loss).item()) < 0.1 * loss.item()  # the balance of each half by itself
    grads = torch.autograd.grad(loss, model.parameters())
    for ours, theirs in zip(grads, torch.autograd.grad(expected.loss, model.parameters()), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    model.eval()
    alone = batch_loss(layers, batch, batch.num_labelled, linear_head=linear_head)
    torch.testing.assert_close(alone, expected.loss - 0.5 * expected.aux_loss, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("learns", [True, False])
def test_the_logits_of_one_chunk_are_gone_before_those_of_the_next_are_made(learns):
    hidden = torch.randn(64, 8, requires_grad=learns)
    weight, labels = torch.randn(5000, 8), torch.arange(64)

    def peak(num_tokens):
        with Ledger(granularity=1, device_type="cpu") as ledger:
            linear_cross_entropy(hidden[:num_tokens], weight, labels[:num_tokens], chunk_tokens=16)
        return ledger.peak_bytes

    assert peak(64) - peak(16) < 16 * 5000  # a byte for each logit would be too much, and they have four
