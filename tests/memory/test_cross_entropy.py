import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lisatune import linear_cross_entropy
from lisatune.memory import cross_entropy


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
