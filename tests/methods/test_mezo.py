"""MeZO against an estimator that stores its noise and moves weights in place, in float64."""

import copy
import hashlib

import pytest
import torch
from torch import nn

from lisatune import LisaEngine, UniformSampler, UserError, find_layers
from lisatune.data.loader import Batch
from lisatune.levers.gradient_checkpointing import checkpoint_layers
from lisatune.levers.offload_frozen import HostLayers
from lisatune.loss import batch_loss
from lisatune.memory.ledger import Ledger
from lisatune.memory.measure import tensor_bytes
from lisatune.methods import mezo as zeroth_order
from lisatune.methods.mezo import RandomDirections, ZerothOrder
from tiny import VOCABULARY, make_llama

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def make_gpt2():
    """Biases, and position embeddings outside of all parts that are called on copies of their own; tied."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config)


def make_gemma2():
    """Logits that are more than a product with the head; tied, and the embedding scales its output."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0, attn_implementation="eager",
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


def make_lora():
    peft = pytest.importorskip("peft", reason="the extra 'lora' is not installed")
    torch.manual_seed(0)
    targets = ["q_proj", "down_proj", "embed_tokens", "lm_head"]
    config = peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.5)
    model = peft.get_peft_model(make_llama(layers=2), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return model


def batch(step, rows=4, tokens=12, device="cpu"):
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(step))
    labels = ids.roll(-1, 1)
    labels[0, : 3 + step % 5] = -100
    positions = torch.arange(tokens).repeat(rows, 1)
    whole = Batch(ids, labels, positions, torch.ones_like(ids, dtype=torch.bool))
    return whole.to(torch.device(device))


def learner_of(model, parameters=None, **options):
    base = getattr(model, "base_model", model)
    layers = find_layers(base.model if hasattr(base, "peft_config") else model)
    settings = {"lr": 1e-3, "seed": 5} | options
    return ZerothOrder(layers, model.parameters() if parameters is None else parameters, **settings)


def run(learner, steps, engine=None, micro_rows=4):
    told = []
    for step in steps:
        if engine:
            engine.begin_step(step, learner.optimizer)
        whole = batch(step)
        loss, slope = learner.step(step, whole.split(micro_rows), whole.num_labelled)
        told.append((loss.item(), slope.item()))
    return told


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stored_noise(model, number, direction, seed=5):
    """Name to z, of parameters numbered in the order of the model."""
    noise = {}
    for place, (name, p) in enumerate(model.named_parameters()):
        digest = hashlib.blake2b(f"direction {seed} {number} {direction} {place}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        noise[name] = torch.randn(p.numel(), generator=generator).view(p.shape).double() * p.requires_grad
    return noise


@torch.no_grad()
def plain_loss(model, whole):
    logits = model(input_ids=whole.input_ids).logits.flatten(0, 1)
    return nn.functional.cross_entropy(logits, whole.labels.flatten())


@torch.no_grad()
def plain_slope(model, whole, noise, epsilon):
    """Two losses in float64, of weights that are moved in place."""
    moved = copy.deepcopy(model).double().eval()

    def loss(distance):
        for name, p in moved.named_parameters():
            p.copy_(model.get_parameter(name).double() + distance * noise[name])
        return plain_loss(moved, whole)

    return ((loss(epsilon) - loss(-epsilon)) / (2 * epsilon)).item(), (loss(epsilon) + loss(-epsilon)).item() / 2


MODELS = {
    "llama": make_llama,
    "tied llama": lambda: make_llama(tied=True),
    "gpt2": make_gpt2,
    "gemma2": make_gemma2,
    "lora": make_lora,
}


@pytest.mark.parametrize("micro_rows", [4, 1])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_that_of_the_plain_estimator(name, frozen, micro_rows):
    """Slopes to 2e-3: a loss near 5 in float32 is known to 5e-7 or so, and divided by 2e-3; weights to rounding."""
    model = MODELS[name]()
    if frozen:
        for number, p in enumerate(model.parameters()):
            p.requires_grad_(p.requires_grad and number % 3 > 0)
    learner = learner_of(model, num_directions=3, weight_decay=0.5, lr=0.1)
    model.train()
    before, whole = weights(model), batch(7)
    loss, slope = learner.step(7, whole.split(micro_rows), whole.num_labelled)
    after = weights(model)
    for n, p in model.named_parameters():
        p.data = before[n]
    noise = [stored_noise(model, 7, direction) for direction in range(3)]
    slopes, losses = zip(*(plain_slope(model, whole, z, 1e-3) for z in noise), strict=True)
    assert max(map(abs, slopes)) > 0.1
    assert learner.optimizer.slopes.tolist() == pytest.approx(slopes, abs=2e-3)
    assert loss.item() == pytest.approx(sum(losses) / 3, abs=1e-5)
    assert slope.item() == pytest.approx((sum(s**2 for s in slopes) / 3) ** 0.5, abs=2e-3)
    assert (loss.dtype, loss.shape, slope.dtype, slope.shape) == (torch.float32, (), torch.float32, ())
    for n, p in model.named_parameters():
        step = sum(s * z[n] for s, z in zip(learner.optimizer.slopes.double(), noise, strict=True)) / 3
        expected = before[n].double() * (1 - 0.1 * 0.5) - 0.1 * step if p.requires_grad else before[n].double()
        torch.testing.assert_close(after[n].double(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(after[n], before[n]) != p.requires_grad


def test_steps_average_to_the_gradient():
    """g * z over N directions, d parameters: the mean is off by (d + 1) / N of the gradient's square, on average.

    With d = 32 and N = 600, 0.055; its own spread is about 2 / sqrt(d) of that. Along the gradient the mean is off by
    sqrt(2 / N) of it, 0.058: 4 sigma. The square of the slope averages to that of the gradient's norm, with a spread of
    sqrt(2 / N) likewise.
    """
    model = make_llama(layers=1)
    model.requires_grad_(False)
    weight = model.model.norm.weight.requires_grad_(True)
    whole = batch(0)
    learner = learner_of(model, [weight], num_directions=600, lr=1.0)
    batch_loss(learner.layers, whole, whole.num_labelled, linear_head=True).backward()
    gradient, weight.grad = weight.grad.double(), None
    before = weight.detach().double()
    _, slope = learner.step(0, [whole], whole.num_labelled)
    estimate = before - weight.detach().double()
    square = gradient.square().sum()
    assert (estimate - gradient).square().sum() / square == pytest.approx(33 / 600, rel=0.7)
    assert estimate @ gradient / square == pytest.approx(1, abs=4 * (2 / 600) ** 0.5)
    assert slope.double() ** 2 / square == pytest.approx(1, abs=4 * (2 / 600) ** 0.5)


@DTYPES
@pytest.mark.parametrize("tied", [False, True])
def test_a_probe_leaves_every_bit_of_the_model_as_it_was(dtype, tied):
    model = make_llama(tied=tied, attention_dropout=0.5).to(dtype)
    model.train()
    model.model.layers[1].eval()
    before, places = weights(model), {name: p.data_ptr() for name, p in model.named_parameters()}
    learner, whole = learner_of(model, linear_head=True), batch(0)
    modes = {name: module.training for name, module in model.named_modules()}
    for step in range(3):
        learner.probe(step, whole.split(2), whole.num_labelled)
    assert same(before, weights(model))
    assert places == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p.grad is not None for p in model.parameters())


def test_a_probe_that_fails_leaves_the_model_as_it_was(monkeypatch):
    model = make_llama(tied=True)
    before, places = weights(model), {name: p.data_ptr() for name, p in model.named_parameters()}
    learner, whole = learner_of(model), batch(0)
    model.train()

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[2].mlp, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            learner.probe(0, [whole], whole.num_labelled)
    assert same(before, weights(model))
    assert places == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training


def test_in_place_weights_would_not_come_back():
    """Why copies are moved: the share of the weights' norm that 100 times + - + leaves as an error."""

    def drift(dtype):
        weight = (torch.randn(2**14) * 0.02).to(dtype)
        start = weight.double()
        for _ in range(100):
            z = torch.randn(2**14).to(dtype)
            for distance in (1e-3, -2e-3, 1e-3):
                weight.add_(z, alpha=distance)
        return ((weight.double() - start).norm() / start.norm()).item()

    assert drift(torch.bfloat16) == pytest.approx(0.039, rel=0.1)
    assert drift(torch.float16) == pytest.approx(0.0049, rel=0.1)
    assert drift(torch.float32) == pytest.approx(6e-7, rel=0.1)


def test_dropout_is_off():
    plain, dropping = make_llama(), make_llama(attention_dropout=0.5)
    plain.eval(), dropping.train()
    assert run(learner_of(plain), range(2)) == run(learner_of(dropping), range(2))
    assert same(weights(plain), weights(dropping))


@pytest.mark.parametrize("tied", [False, True])
def test_with_lisa_only_active_layers_move(tied):
    model = make_llama(tied=tied)
    layers = find_layers(model)
    engine = LisaEngine(layers, UniformSampler(4, 1, seed=0), interval_steps=2, train_embedding=False, train_head=False)
    learner = learner_of(model)
    drawn = set()
    for step in range(12):
        before = weights(model)
        run(learner, [step], engine)
        parts = {f"layers.{i}" for i in engine.active} | {"norm"}
        drawn |= parts
        for part, own in layers.parts().items():
            assert all(torch.equal(before[n], p) != (part in parts) for n, p in own.items()), part
    assert len(drawn) == 5
    assert not learner.optimizer.state


@pytest.mark.parametrize("what", ["all", "adapters"])
def test_the_loss_falls(what):
    """On one batch, from a model that knows nothing; the same directions every time, so the numbers are repeatable."""
    model = make_lora() if what == "adapters" else make_llama()
    learner, whole = learner_of(model, lr={"all": 3e-3, "adapters": 1e-2}[what], num_directions=4), batch(0)
    losses = [learner.step(step, [whole], whole.num_labelled)[0].item() for step in range(40)]
    assert losses[-1] < losses[0] - 0.15, losses


@pytest.mark.parametrize("name", ["llama", "tied llama"])
@DTYPES
def test_the_peak_is_that_of_an_evaluation_and_one_part(name, dtype, monkeypatch):
    """Counted to the byte: besides, a layer's copies or the vocabulary's, the norm's, and five blocks of noise."""
    monkeypatch.setattr(zeroth_order, "BLOCK", 256)
    model = MODELS[name]().to(dtype)
    learner, whole = learner_of(model, num_directions=2), batch(0, rows=8, tokens=64)
    micro_batches = list(whole.split(4))
    with Ledger(granularity=1, device_type="cpu") as ledger:
        for t in (*model.parameters(), whole.input_ids, whole.labels, whole.position_ids, whole.is_token):
            ledger.book(t, "there already")
        held = ledger.total_bytes
        with torch.no_grad():
            for micro in micro_batches:
                batch_loss(learner.layers, micro, whole.num_labelled, linear_head=True)
        evaluation = ledger.peak_bytes - held
        ledger.reset_peak()
        learner.step(0, micro_batches, whole.num_labelled)
        peak, left = ledger.peak_bytes - held, ledger.total_bytes - held
    parts = {part: tensor_bytes(own.values()) for part, own in learner.layers.parts().items()}
    largest = max(size for part, size in parts.items() if part != "norm")
    assert peak <= evaluation + largest + parts["norm"] + 5 * 256 * 4 + 64
    assert peak < evaluation + 0.3 * sum(parts.values()) + 5 * 256 * 4  # of four layers and a vocabulary of 128
    assert left <= 64  # the slopes


@DTYPES
def test_the_same_seed_gives_the_same_weights_and_another_one_others(dtype):
    def after(**options):
        model = make_llama().to(dtype)
        run(learner_of(model, **options), range(3))
        return weights(model)

    assert same(after(), after())
    assert not same(after(), after(seed=6))
    assert not same(after(), after(num_directions=2))


def test_noise_depends_on_seed_step_direction_and_place_but_not_on_the_type():
    def noise(seed=0, number=0, direction=0, place=0, dtype=torch.float32):
        parameters = [nn.Parameter(torch.ones(9, 70, dtype=dtype)) for _ in range(2)]
        optimizer = RandomDirections(parameters, lr=1.0, seed=seed)
        optimizer.number = number
        return torch.cat(list(optimizer.noise(parameters[place], direction)))

    first = noise()
    assert torch.equal(first, noise(dtype=torch.bfloat16))
    for other in (noise(seed=1), noise(number=1), noise(direction=1), noise(place=1)):
        assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 5 / 630**0.5
    assert abs(first.mean()) < 5 / 630**0.5
    assert first.var() == pytest.approx(1, abs=5 * (2 / 630) ** 0.5)


def test_noise_in_many_blocks_is_the_same_on_the_way_up_down_and_back(monkeypatch):
    monkeypatch.setattr(zeroth_order, "BLOCK", 100)
    p = nn.Parameter(torch.zeros(9, 70, dtype=torch.float64))
    optimizer = RandomDirections([p], lr=0.5)
    up, down = (optimizer.moved(p, 0, distance) for distance in (0.5, -0.5))
    optimizer.slopes = torch.ones(1)
    optimizer.step()
    assert up.unique().numel() > 620
    assert torch.equal(up, -down)
    torch.testing.assert_close(p.detach(), -up)


@DTYPES
def test_a_resumed_run_is_the_same_to_the_bit_with_nothing_saved_but_weights(dtype):
    plain = make_llama().to(dtype)
    learner = learner_of(plain, num_directions=2)
    told = run(learner, range(4))
    resumed = copy.deepcopy(plain)
    told = run(learner, range(4, 8))
    assert run(learner_of(resumed, num_directions=2), range(4, 8)) == told
    assert same(weights(plain), weights(resumed))
    assert not learner.optimizer.state


def test_small_updates_arrive_in_bfloat16():
    """Steps of 1e-4 on weights of 1, where the next lower one is 2**-8 away: on average they are made."""
    p = nn.Parameter(torch.ones(2**14, dtype=torch.bfloat16))
    optimizer = RandomDirections([p], lr=1e-4)
    optimizer.slopes = torch.ones(1)
    z = torch.cat(list(optimizer.noise(p, 0)))
    optimizer.step()
    change = p.detach().float() - 1
    assert (change != 0).float().mean() < 0.05
    # a rounding's variance is below 2**-7 * 1e-4 * abs(z), so sigma is 6e-6
    assert (change @ z / (z @ z)).item() == pytest.approx(-1e-4, abs=3e-5)


def test_rounding_is_another_in_each_step():
    def decayed(number):
        p = nn.Parameter(torch.ones(256, dtype=torch.bfloat16))
        optimizer = RandomDirections([p], lr=1e-3, weight_decay=1.0)
        optimizer.number, optimizer.slopes = number, torch.zeros(1)
        optimizer.step()
        return p.detach()

    assert torch.equal(decayed(0), decayed(0))
    assert not torch.equal(decayed(0), decayed(1))


def test_a_loss_that_is_not_finite_stops_before_the_update():
    model = make_llama()
    learner = learner_of(model)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    before, whole = weights(model), batch(0)
    with pytest.raises(UserError, match="step 3: the loss is nan and its slope nan"):
        learner.step(2, [whole], whole.num_labelled)
    after = weights(model)
    assert all(torch.equal(before[n].nan_to_num(9), after[n].nan_to_num(9)) for n in before)


def test_frozen_layers_can_be_streamed():
    plain, model = make_llama(), make_llama()
    results = []
    for one, streams in ((plain, False), (model, True)):
        layers = find_layers(one)
        host_layers = None
        if streams:
            checkpoint_layers(layers.decoder)
            host_layers = HostLayers(layers.decoder, torch.device("cpu"))
        engine, learner = LisaEngine(layers, UniformSampler(4, 1, seed=0), interval_steps=2), learner_of(one)
        one.train()
        for step in range(6):
            whole = batch(step)
            if engine.begin_step(step, learner.optimizer) and host_layers:
                host_layers.place()
            results.append(learner.step(step, whole.split(2), whole.num_labelled))
    assert results[:6] == results[6:]
    assert same(weights(plain), weights(model))


@DTYPES
def test_on_meta_it_holds_what_it_holds_on_a_cpu(dtype):
    """The optimizer's part of a forecast; the model's needs the forecast's own attention."""
    peaks = []
    for device in ("cpu", "meta"):
        p = nn.Parameter(torch.zeros(64, 70, dtype=dtype, device=device))
        optimizer = RandomDirections([p], lr=1.0, weight_decay=0.1)
        with Ledger(granularity=1, device_type=device) as ledger:
            ledger.book(p, "there already")
            copies = [optimizer.moved(p, 0, distance) for distance in (1e-3, -1e-3)]
            peaks.append(ledger.peak_bytes)
            ledger.reset_peak()
            optimizer.slopes = torch.ones(2, device=device)
            optimizer.step()
        assert [(c.shape, c.dtype, c.device) for c in copies] == [(p.shape, p.dtype, p.device)] * 2
        peaks.append(ledger.peak_bytes)
    assert peaks[:2] == peaks[2:]


def test_what_cannot_be_is_refused():
    model = make_llama()
    with pytest.raises(UserError, match="epsilon is 0: choose a number above 0"):
        learner_of(model, epsilon=0)
    with pytest.raises(UserError, match="num_directions is 0: choose at least 1"):
        learner_of(model, num_directions=0)
    learner, whole = learner_of(model), batch(0)
    model.model.layers = model.model.layers[:3]
    before = weights(model)
    with pytest.raises(UserError, match="LlamaDecoderLayer was not called in the forward pass"):
        learner.step(0, [whole], whole.num_labelled)
    assert same(before, weights(model))
    model.requires_grad_(False)
    learner = learner_of(model)
    with pytest.raises(UserError, match="no parameter requires a gradient"):
        learner.step(0, [whole], whole.num_labelled)
