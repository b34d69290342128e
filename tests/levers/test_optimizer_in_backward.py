import pytest
import torch

from lisatune import AdamW, LisaEngine, UniformSampler, UserError, find_layers, linear_cross_entropy
from lisatune.levers.optimizer_in_backward import StepInBackward
from lisatune.optim.row_gradients import RowGradients, watch_embedding
from tiny import make_llama

IDS = torch.randint(0, 128, (4, 10), generator=torch.Generator().manual_seed(0))


class Run:
    """A model in training, with the step at the end or in the backward pass; one set of options makes equal weights."""

    def __init__(self, *, in_backward, rows=False, dtype=torch.float32, checkpointing=False, tied=False, **options):
        self.model = make_llama(tied=tied, layers=3).to(dtype)
        if checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.store = RowGradients() if rows else None
        if rows:
            watch_embedding(self.model.model.embed_tokens, self.store)
        self.optimizer = AdamW(self.model.parameters(), lr=1e-2, row_gradients=self.store, **options)
        self.stepper = StepInBackward(self.optimizer) if in_backward else None
        layers = find_layers(self.model)
        self.engine = LisaEngine(layers, UniformSampler(len(layers.decoder), num_active=1, seed=0), interval_steps=2)
        self.most_gradients = 0

    def step(self, number):
        """One step; returns the global norm."""
        self.engine.begin_step(number, self.optimizer)
        ids = IDS.roll(number, 1)
        hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        linear_cross_entropy(
            hidden, self.model.lm_head.weight, ids[:, 1:].flatten(), row_gradients=self.store
        ).backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.most_gradients = max(self.most_gradients, len(gradients))
        squares = [g.float().square().sum() for g in gradients]
        if self.stepper is None and self.store is not None:
            squares += [self.store.sq_norm(p) for p in self.store.parameters()]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.stepper.grad_norm() if self.stepper else sum(squares).sqrt()


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tied": True},
        {"checkpointing": True},
        {"dtype": torch.bfloat16, "state_bits": 8, "block_elements": 1024},
        {"tied": True, "dtype": torch.bfloat16, "state_bits": 16, "offload_state": True, "seed": 3},
    ],
    ids=str,
)
def test_equals_the_plain_step_to_the_bit(options, rows):
    """Over four LISA intervals: layers are frozen, thawed and lose their state, and the hooks stay."""
    plain, ours = (Run(in_backward=in_backward, rows=rows, **options) for in_backward in (False, True))
    drawn = set()
    for number in range(8):
        norms = plain.step(number), ours.step(number)
        # sums of squares in another order
        torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
        for p, q in zip(plain.model.parameters(), ours.model.parameters(), strict=True):
            assert torch.equal(p, q)
            assert plain.optimizer.state[p].keys() == ours.optimizer.state[q].keys()
            assert all(torch.equal(a, ours.optimizer.state[q][k]) for k, a in plain.optimizer.state[p].items())
        drawn.add(ours.engine.active)
    assert len(drawn) > 1
    assert ours.most_gradients == 0 < plain.most_gradients


def test_a_gradient_is_gone_before_the_next_layer_s_is_made():
    """Seen from inside the backward pass: never more gradients at once than one layer has parameters."""
    model = make_llama()
    optimizer = AdamW(model.parameters())
    StepInBackward(optimizer)
    alive = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in model.parameters()))
        )
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert len(alive) == len(list(model.parameters()))
    assert max(alive) <= len(list(model.model.layers[0].parameters()))


def test_the_hook_of_a_tied_matrix_fires_once_with_the_whole_gradient():
    model, plain = make_llama(tied=True), make_llama(tied=True)
    optimizer = AdamW(model.parameters())
    seen = []
    update = optimizer.update
    optimizer.update = lambda p, **options: (
        seen.append(p.grad.clone()) if p is model.lm_head.weight else None,
        update(p, **options),
    )
    StepInBackward(optimizer)
    for one in (model, plain):
        one(input_ids=IDS, labels=IDS).loss.backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], plain.lm_head.weight.grad)


def test_a_dense_gradient_beside_row_gradients_waits_for_them():
    """A tied head whose loss is the model's own: the hook leaves the matrix to ``optimizer.step()``."""
    models = []
    for in_backward in (False, True):
        model, store = make_llama(tied=True), RowGradients()
        watch_embedding(model.model.embed_tokens, store)
        optimizer = AdamW(model.parameters(), row_gradients=store)
        if in_backward:
            StepInBackward(optimizer)
        for _ in range(2):
            model(input_ids=IDS, labels=IDS).loss.backward()
            assert model.lm_head.weight.grad is not None
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in models), strict=True))


def test_frozen_parameters_stay_frozen():
    model = make_llama()
    model.lm_head.requires_grad_(False)
    StepInBackward(AdamW(model.parameters()))
    assert not model.lm_head.weight.requires_grad
    assert model.model.norm.weight.requires_grad


def test_a_second_backward_pass_is_refused():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([weight])
    StepInBackward(optimizer)
    weight.sum().backward()
    with pytest.raises(UserError, match="cannot add up gradients of several micro-batches"):
        weight.sum().backward()


def test_the_norm_is_of_one_step_and_remove_ends_it():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = AdamW([weight])
    stepper = StepInBackward(optimizer)
    assert stepper.grad_norm() == 0
    for size in (3.0, 4.0):
        (weight * size).sum().backward()
        optimizer.step()
        assert stepper.grad_norm().item() == pytest.approx(size * 2**0.5)
    stepper.remove()
    before = weight.detach().clone()
    weight.sum().backward()
    assert torch.equal(weight, before)
    assert weight.grad is not None


def test_a_step_on_meta():
    model = make_llama(tied=True).to("meta")
    store = RowGradients()
    watch_embedding(model.model.embed_tokens, store)
    optimizer = AdamW(model.parameters(), row_gradients=store)
    stepper = StepInBackward(optimizer)
    ids = IDS.to("meta")
    hidden = model.model(input_ids=ids).last_hidden_state.flatten(0, 1)
    linear_cross_entropy(hidden, model.lm_head.weight, ids.flatten(), row_gradients=store).backward()
    optimizer.step()
    assert stepper.grad_norm().is_meta
    assert all(p.grad is None for p in model.parameters())
    assert not store.parameters()
