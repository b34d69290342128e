"""Each optimizer against its paper, in float64 and without any care for speed, while LISA freezes and thaws."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lisatune import LisaEngine, UniformSampler, UserError, find_layers
from lisatune.memory.measure import state_bytes
from lisatune.optim import layerwise, make_optimizer
from lisatune.optim.layerwise import Lamb, Lars
from tiny import VOCABULARY, make_llama

NAMES = ["sgd", "lars", "lamb", "adafactor", "muon"]
EACH = pytest.mark.parametrize("name", NAMES)
DECAY, MOMENTUM, ETA, BETA1, BETA2, EPS = 0.1, 0.8, 0.5, 0.9, 0.99, 1e-8


def paper_sgd(p, g, kept, lr):
    kept["m"] = MOMENTUM * kept.get("m", 0) + g + DECAY * (p.ndim == 2) * p
    return p - lr * kept["m"]


def paper_lars(p, g, kept, lr):
    """arXiv:1708.03888, algorithm 1; vectors without the ratio."""
    decay = DECAY * (p.ndim == 2)
    ratio = ETA * p.norm() / (g.norm() + decay * p.norm()) if p.ndim == 2 and p.norm() * g.norm() > 0 else 1
    kept["v"] = MOMENTUM * kept.get("v", 0) + lr * ratio * (g + decay * p)
    return p - kept["v"]


def adam_direction(p, g, kept):
    t = kept["t"] = kept.get("t", 0) + 1
    kept["m"] = BETA1 * kept.get("m", 0) + (1 - BETA1) * g
    kept["v"] = BETA2 * kept.get("v", 0) + (1 - BETA2) * g**2
    return kept["m"] / (1 - BETA1**t) / ((kept["v"] / (1 - BETA2**t)).sqrt() + EPS) + DECAY * (p.ndim == 2) * p


def paper_lamb(p, g, kept, lr):
    """arXiv:1904.00962, algorithm 2; vectors without the ratio."""
    u = adam_direction(p, g, kept)
    ratio = p.norm() / u.norm() if p.ndim == 2 and p.norm() * u.norm() > 0 else 1
    return p - lr * ratio * u


def paper_adafactor(p, g, kept, lr):
    """arXiv:1804.04235, algorithms 4 and 5, with decoupled weight decay."""
    t = kept["t"] = kept.get("t", 0) + 1
    beta, squares = 1 - t**-0.8, g**2 + 1e-30
    alpha = max(1e-3, p.pow(2).mean().sqrt()) * min(lr, t**-0.5)
    if p.ndim == 2:
        kept["r"] = beta * kept.get("r", 0) + (1 - beta) * squares.sum(1, keepdim=True)
        kept["c"] = beta * kept.get("c", 0) + (1 - beta) * squares.sum(0, keepdim=True)
        v = kept["r"] @ kept["c"] / kept["r"].sum()
    else:
        v = kept["v"] = beta * kept.get("v", 0) + (1 - beta) * squares
    u = g / v.sqrt()
    return p * (1 - lr * DECAY * (p.ndim == 2)) - alpha * u / max(1, u.pow(2).mean().sqrt())


def paper_muon(p, g, kept, lr, *, hidden):
    """The quintic of Jordan's page on each singular value; momentum and scale of arXiv:2502.16982; AdamW for the rest."""
    if not hidden:
        return p - lr * adam_direction(p, g, kept)
    kept["m"] = MOMENTUM * kept.get("m", 0) + (1 - MOMENTUM) * g
    direction = newton_schulz((1 - MOMENTUM) * g + MOMENTUM * kept["m"])
    return p * (1 - lr * DECAY) - 0.2 * max(p.shape) ** 0.5 * lr * direction


def newton_schulz(matrix):
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left * values @ right


PAPERS = {"sgd": paper_sgd, "lars": paper_lars, "lamb": paper_lamb, "adafactor": paper_adafactor, "muon": paper_muon}
# of the way gone so far, float32 against float64; muon's iteration multiplies the smallest singular values by 3.44**5
TOLERANCE = dict.fromkeys(NAMES, 1e-5) | {"muon": 1e-4}


def make(name, model, **options):
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    settings = {"lr": 1e-2, "betas": (BETA1, BETA2), "eps": EPS, "momentum": MOMENTUM, "trust_coefficient": ETA}
    return make_optimizer(name, groups, vocabulary=list(vocabulary(model).values()), **(settings | options))


def vocabulary(model):
    parts = find_layers(model).parts()
    return parts["embedding"] | parts["head"]


def make_engine(model, **options):
    layers = find_layers(model)
    return LisaEngine(layers, UniformSampler(len(layers.decoder), 1, seed=0), interval_steps=2, **options)


def gradients(model, step):
    ids = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(step))
    model(input_ids=ids, labels=ids).loss.backward()


def run(model, optimizer, steps, engine=None):
    for step in steps:
        if engine:
            engine.begin_step(step, optimizer)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step % 5)
        gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@EACH
@pytest.mark.parametrize("tied", [False, True])
def test_24_steps_over_12_switches_are_those_of_the_paper(name, tied, monkeypatch):
    """The paper's optimizer takes the same gradients; a layer that LISA froze begins with nothing.

    Muon's iteration is in bfloat16, whose noise is as large as the small singular values of a gradient: it is put aside
    here, and compared below.
    """
    monkeypatch.setattr(
        torch.optim._muon, "_zeropower_via_newtonschulz", lambda g, *_: newton_schulz(g.double()).float()
    )
    model = make_llama(tied=tied)
    optimizer, engine = make(name, model), make_engine(model)
    expected = {n: p.detach().double() for n, p in model.named_parameters()}
    kept, moved = {}, {}
    thawed_again = set()
    for step in range(24):
        engine.begin_step(step, optimizer)
        lr = 1e-2 / (1 + step % 5)
        for group in optimizer.param_groups:
            group["lr"] = lr
        gradients(model, step)
        before = weights(model)
        for n, p in model.named_parameters():
            if p.grad is None:
                kept.pop(n, None)
                continue
            thawed_again |= {n} if n in moved and n not in kept else set()
            own, rest = kept.setdefault(n, {}), {}
            if name == "muon":
                rest = {"hidden": p.ndim == 2 and n not in vocabulary(model)}
            new = PAPERS[name](expected[n], p.grad.double(), own, lr, **rest)
            moved[n] = moved.get(n, 0) + (new - expected[n]).norm()
            expected[n] = new
        optimizer.step()
        for n, p in model.named_parameters():
            if p.grad is None:
                assert torch.equal(before[n], p), n
                assert p not in optimizer.state
            else:
                assert not torch.equal(before[n], p), n
                # in units of the way so far, and 3e-7 for the rounding of the weights themselves
                error = (p.double() - expected[n]).norm()
                assert error < TOLERANCE[name] * moved[n] + 3e-7 * p.norm(), (step, n, error / moved[n])
        optimizer.zero_grad()
    assert len(thawed_again) > 20  # parameters of three layers: they were trained, frozen and trained again


@EACH
@pytest.mark.parametrize("shape", [(16, 24), (16,)])
def test_a_layer_that_begins_late_or_again_steps_as_in_a_fresh_optimizer_to_the_bit(name, shape):
    generator = torch.Generator().manual_seed(0)
    late, other = (torch.nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(2))
    start, grads = late.detach().clone(), torch.randn(60, *shape, generator=generator)

    def optimizer(*parameters):
        return make_optimizer(name, [{"params": list(parameters), "weight_decay": DECAY}], lr=1e-2)

    def steps(opt, p, count):
        for grad in grads[:count]:
            p.grad = grad.clone()
            opt.step()
            p.grad = None
        return p.detach().clone()

    expected = steps(optimizer(fresh := torch.nn.Parameter(start.clone())), fresh, 5)
    long = optimizer(late, other)
    steps(long, other, 50)
    assert torch.equal(late, start)
    assert late not in long.state
    assert torch.equal(steps(long, late, 5), expected)
    long.state.pop(late)
    late.data = start.clone()
    assert torch.equal(steps(long, late, 5), expected)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_saved_and_resumed_in_mid_interval_is_the_same_to_the_bit(name, dtype):
    plain = make_llama().to(dtype)
    optimizer, engine = make(name, plain, seed=3), make_engine(plain)
    run(plain, optimizer, range(7), engine)
    saved = optimizer.state_dict()
    assert all(isinstance(v, torch.Tensor) for state in saved["state"].values() for v in state.values())
    resumed = copy.deepcopy(plain)
    again, engine_again = make(name, resumed, seed=3), make_engine(resumed)
    again.load_state_dict(saved)  # and not share it: both runs go on
    held = {t.dtype for state in again.state.values() for t in state.values()}
    assert held <= {torch.float32}  # whatever the weights are
    run(plain, optimizer, range(7, 15), engine)
    run(resumed, again, range(7, 15), engine_again)
    assert same(weights(plain), weights(resumed))
    theirs = optimizer.state_dict()["state"]
    assert all(same(state, theirs[number]) for number, state in again.state_dict()["state"].items())


@EACH
@pytest.mark.parametrize("policy", ["keep", "reset_all"])
def test_state_is_kept_or_reset_as_lisa_is_told(name, policy):
    model = make_llama()
    optimizer, engine = make(name, model), make_engine(model, state_policy=policy)
    run(model, optimizer, range(6), engine)
    trained = {p for p in model.parameters() if p.requires_grad}
    if policy == "reset_all":
        assert set(optimizer.state) == trained
        steps = [state["step"].item() for state in optimizer.state.values() if "step" in state]
        assert set(steps) <= {2}
    else:
        frozen = {p: copy.deepcopy(state) for p, state in optimizer.state.items() if p not in trained}
        assert frozen
        run(model, optimizer, range(6, 8), engine)
        assert all(same(state, optimizer.state[p]) for p, state in frozen.items() if not p.requires_grad)


@pytest.mark.parametrize("zero", ["weight", "gradient"])
def test_where_a_norm_is_zero_the_trust_ratio_is_one(zero):
    weight, grad = torch.full((2, 3), 2.0), torch.full((2, 3), 0.5)
    (weight if zero == "weight" else grad).zero_()
    p = torch.nn.Parameter(weight.clone())
    p.grad = grad.clone()
    Lars([p], lr=0.1, weight_decay=0.3, trust_coefficient=0.01, momentum=0.0).step()
    torch.testing.assert_close(p.detach(), weight - 0.1 * (grad + 0.3 * weight))
    p = torch.nn.Parameter(weight.clone())
    p.grad = grad.clone()
    Lamb([p], lr=0.1, weight_decay=0.0).step()
    torch.testing.assert_close(p.detach(), weight - 0.1 * grad.sign())  # Adam's first step


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_vectors_are_scaled_by_their_norms_only_if_asked(name):
    def change(adapt, shape):
        p = torch.nn.Parameter(torch.full(shape, 3.0))
        p.grad = torch.full(shape, 0.25)
        make_optimizer(name, [{"params": [p], "weight_decay": 0.0}], lr=0.1, adapt_vectors=adapt).step()
        return 3.0 - p.detach().flatten()

    plain = {"lars": 0.1 * 0.25, "lamb": 0.1}[name]
    torch.testing.assert_close(change(False, (8,)), torch.full((8,), plain))
    torch.testing.assert_close(change(True, (8,)), torch.full((8,), 0.3))  # a tenth of the norm
    for adapt in (False, True):
        torch.testing.assert_close(change(adapt, (2, 4)), torch.full((8,), 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(size=st.integers(1, 70), data=st.data())
def test_the_size_of_a_block_changes_nothing_but_rounding(dtype, size, data):
    name = data.draw(st.sampled_from(["lars", "lamb"]))
    results = []
    for block in (size, 2**20):
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(7, 9, generator=generator).to(dtype))
        optimizer = make_optimizer(name, [{"params": [p], "weight_decay": DECAY}], lr=0.1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layerwise, "CPU_BLOCK", block)
            for _ in range(3):
                p.grad = torch.randn(7, 9, generator=generator).to(dtype)
                optimizer.step()
        results.append(p.detach().float())
    # norms are summed in another order; where that tips a rounding over, by a step of bfloat16
    torch.testing.assert_close(*results, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-6)


def bare(name, p, lr):
    """What the library itself does."""
    if name == "sgd":
        return torch.optim.SGD([p], lr=lr, momentum=0.0)
    if name == "adafactor":
        return torch.optim.Adafactor([p], lr=lr)
    return torch.optim.Muon([p], lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


@EACH
def test_small_updates_arrive_in_bfloat16(name):
    """Weights of 1 and steps of 2e-4 or so, 50 of them: rounding to nearest leaves 1, the steps being under 1/512."""

    def moved(make_it, dtype):
        p = torch.nn.Parameter(torch.ones(64, 64, dtype=dtype))
        optimizer = make_it(p)
        for _ in range(50):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return 1 - p.float().mean().item()

    rate = 2e-3 if name == "muon" else 2e-4  # of a matrix of ones, which has rank one, muon's step is about 0.02 * lr

    def ours(p):
        return make_optimizer(name, [{"params": [p], "weight_decay": 0.0}], lr=rate, momentum=0.0)

    in_float32, in_bfloat16 = moved(ours, torch.float32), moved(ours, torch.bfloat16)
    assert in_float32 > 1e-3
    # of 50 steps on 4,096 weights; each adds at most half of 2**-8, squared, of variance: sigma is below 2.2e-4
    assert in_bfloat16 == pytest.approx(in_float32, abs=6.6e-4)
    if name in ("sgd", "adafactor", "muon"):
        assert moved(lambda p: bare(name, p, rate), torch.bfloat16) == 0


@EACH
def test_bfloat16_is_float32_to_rounding(name):
    """Same state, and weights that differ by their rounding: over 6 steps of about 1e-2, at most one per step."""
    wide, narrow = (make_llama().bfloat16() for _ in range(2))
    wide.float()
    a, b = make(name, wide), make(name, narrow)
    for step in range(6):
        gradients(wide, step)
        for p, q in zip(wide.parameters(), narrow.parameters(), strict=True):
            q.grad = p.grad.bfloat16()
            p.grad = q.grad.float()
        kept = [p.grad.clone() for p in narrow.parameters()]
        a.step(), b.step()
        assert same(dict(enumerate(kept)), dict(enumerate(p.grad for p in narrow.parameters())))
    for (n, p), q in zip(wide.named_parameters(), narrow.parameters(), strict=True):
        assert q.dtype == torch.bfloat16
        error = (p.float() - q.float()).abs()
        assert (error <= 6 * 2**-7 * p.abs() + 2e-3).all(), (n, error.max())
        assert error.mean() < 2**-7 * p.abs().mean() + 1e-4, n


def test_rounding_depends_on_the_seed_the_step_and_the_place():
    def after(seed, first_step=0, place=0):
        parameters = [torch.nn.Parameter(torch.ones(256, 1, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = make_optimizer("sgd", [{"params": parameters, "weight_decay": 0.0}], lr=1e-3, seed=seed)
        for _ in range(first_step):
            optimizer.step()
        parameters[place].grad = torch.ones(256, 1, dtype=torch.bfloat16)
        optimizer.step()
        return parameters[place].detach()

    assert torch.equal(after(0), after(0))
    for other in (after(1), after(0, first_step=1), after(0, place=1)):
        assert not torch.equal(after(0), other)


def test_adafactor_bears_rows_without_gradient_and_gradients_of_any_size():
    for scale in (1e-2, 1e-5, 1e-8):
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(16, 8, generator=generator))
        p.grad = torch.randn(16, 8, generator=generator) * scale
        p.grad[3] = 0
        start, grad = p.detach().double(), p.grad.double()
        make_optimizer("adafactor", [{"params": [p], "weight_decay": 0.0}], lr=1e-2).step()
        expected = start - 1e-2 * start.pow(2).mean().sqrt() * (u := paper_factored(grad)) / max(
            1, u.pow(2).mean() ** 0.5
        )
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(p.detach()[3].double(), start[3])


def paper_factored(grad):
    squares = grad**2 + 1e-30
    return grad / (squares.sum(1, keepdim=True) @ squares.sum(0, keepdim=True) / squares.sum()).sqrt()


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
def test_muons_iteration_is_that_of_its_page(shape):
    """Of a matrix whose singular values lie between 1 and 2: 1.6% was seen, bfloat16's 0.2% through five iterations."""
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = left * torch.linspace(1, 2, min(shape)) @ right
    make_optimizer("muon", [{"params": [p], "weight_decay": 0.0}], lr=1.0, momentum=0.0).step()
    expected = -0.2 * max(shape) ** 0.5 * newton_schulz(p.grad)
    assert (p.detach() - expected).norm() < 0.03 * expected.norm()


def test_muon_takes_hidden_matrices_alone():
    shapes = {"hidden": (4, 6), "head": (9, 4), "bias": (4,), "experts": (2, 4, 6), "scalar": ()}
    parameters = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    groups = [{"params": list(parameters.values()), "weight_decay": 0.0}]
    optimizer = make_optimizer("muon", groups, lr=1e-3, vocabulary=[parameters["head"]])
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    names = {name: set(optimizer.state[p]) for name, p in parameters.items()}
    assert names.pop("hidden") == {"momentum_buffer"}
    assert all(state == {"exp_avg", "exp_avg_sq", "step"} for state in names.values())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(shapes)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forecast_holds_the_same_state(name, dtype):
    sizes = []
    for device in ("cpu", "meta"):
        parameters = [torch.nn.Parameter(torch.ones(shape, dtype=dtype, device=device)) for shape in [(8, 6), (5,)]]
        optimizer = make_optimizer(name, [{"params": parameters, "weight_decay": DECAY}], lr=1e-2)
        for _ in range(2):
            for p in parameters:
                p.grad = torch.ones_like(p)
            optimizer.step()
        sizes.append(state_bytes(optimizer))
    assert sizes[0] == sizes[1] > 0


def test_what_cannot_be_is_refused():
    p = torch.nn.Parameter(torch.ones(4, 4))
    with pytest.raises(UserError, match="optim is 'lion': choose one of adamw, adamw_16bit"):
        make_optimizer("lion", [{"params": [p]}], lr=1e-2)
    turned = torch.nn.Parameter(torch.ones(4, 5).T)
    for name in NAMES:
        with pytest.raises(UserError, match=r"shape \(5, 4\) is not contiguous"):
            make_optimizer(name, [{"params": [turned], "weight_decay": 0.0}], lr=1e-2)


class Sizes(TorchDispatchMode):
    """Elements of the largest tensor that an operation made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in made:
                self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.parametrize("name", ["lars", "lamb"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_temporary_is_larger_than_a_block(name, dtype, monkeypatch):
    monkeypatch.setattr(layerwise, "CPU_BLOCK", 64)
    p = torch.nn.Parameter(torch.ones(64, 16, dtype=dtype))
    optimizer = make_optimizer(name, [{"params": [p], "weight_decay": DECAY}], lr=1e-2)
    for sizes in (Sizes(), Sizes()):
        p.grad = torch.ones_like(p)
        with sizes:
            optimizer.step()
    assert sizes.largest == 64  # in the first step the state was made
