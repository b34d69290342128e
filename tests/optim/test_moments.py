import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lisatune import UserError
from lisatune.memory.measure import tensor_bytes
from lisatune.optim.moments import FIRST_TOP, GROUP, SECOND_TOP, Moments, _codes

WHOLE = 2**16


def random_noise(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (n,), generator=generator).int()


def store_and_load(moments, first, second, noise):
    state = moments.zeros(first)
    ((_, _, held),) = moments.walk(state, [(0, len(first))], first.device)
    moments.store(held, first, second, noise)
    return state, *moments.load(held)


def plain_8bit(x, table, chance):
    """The slow, clear equal: all values that a group can hold, and the choice between the two next to ``x``.

    Returns values, the distance of the two between which was chosen, and how near the choice was to falling otherwise.
    """
    values, gaps, margins = [], [], []
    for at in range(0, len(x), GROUP):
        group, drawn = x[at : at + GROUP].double(), chance[at : at + GROUP]
        held = table * group.abs().max()
        lower = (torch.searchsorted(held, group, right=True) - 1).clamp(0, len(held) - 2)
        low, high = held[lower], held[lower + 1]
        up = (group - low) / (high - low).clamp(min=1e-300)
        # the first moment's magnitude is what is rounded: below zero a draw moves away from zero too
        margin = torch.where(group < 0, 1 - up, up) - drawn
        values.append(torch.where((margin > 0) == (group >= 0), high, low))
        gaps.append(high - low)
        margins.append(margin)
    return torch.cat(values), torch.cat(gaps), torch.cat(margins)


SIGNED = torch.arange(-127, 128).double().div(127)
TABLES = {"first": SIGNED.abs() * SIGNED, "second": (torch.arange(256).double() / 255) ** 4}


@given(n=st.integers(1, 700), spread=st.floats(0, 6), size=st.floats(-20, 5), seed=st.integers(0, 2**32))
def test_8_bits_equal_the_plain_table(n, spread, size, seed):
    """Float32 makes the chance of rounding up 1e-4 wrong at most (5e-6 seen): where the draw is nearer, either will do."""
    generator = torch.Generator().manual_seed(seed)
    first, power = torch.randn(2, n, generator=generator) * torch.tensor([[1.0], [spread]])
    first, second = first * 10**size, 10 ** (power + size)
    noise = random_noise(n, seed)
    _, *loaded = store_and_load(Moments(8), first, second, noise)
    for x, ours, table, half in zip(
        (first, second), loaded, TABLES.values(), (noise & 0xFFFF, (noise >> 16) & 0xFFFF), strict=True
    ):
        value, gap, margin = plain_8bit(x, table, (half + 0.5).double() / WHOLE)
        if x is second:
            lifted = value == 0  # positive, so it gets code 1
            value[lifted], margin[lifted] = gap[lifted], 1
        decided = margin.abs() > 1e-4
        torch.testing.assert_close(ours[decided].double(), value[decided], rtol=1e-5, atol=0)
        assert ((ours.double() - x).abs() <= gap * 1.0001).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_rounding_is_unbiased(bits):
    """A value lies between two that can be held, ``gap`` apart, so one draw's sigma is gap / 2 at most and that of the
    mean of 16,384 draws 128 times less: 5 sigma allowed, of 1,024 values. Nearest rounding would miss by gap / 4."""
    n, draws = 512, 2**14
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(n, generator=generator)
    second = 10 ** (2 * torch.randn(n, generator=generator) - 8)
    second[0] = 0
    sums = torch.zeros(2, n, dtype=torch.float64)
    for seed in range(draws):
        sums += torch.stack(store_and_load(Moments(bits), first, second, random_noise(n, seed))[1:])
    for mean, x, table in zip(sums / draws, (first, second), TABLES.values(), strict=True):
        gap = plain_8bit(x, table, torch.zeros(n))[1] if bits == 8 else x.abs() / 128
        error = (mean - x).abs()
        if x is second:  # those below code 1 are held as code 1, on purpose
            assert error[0] == 0
            error[x < table[1] * x.view(-1, GROUP).amax(1).repeat_interleave(GROUP)] = 0
        assert (error <= 5 * gap / 2 / draws**0.5 + 1e-6 * x.abs()).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_changes_of_a_thousandth_arrive(bits):
    """500 steps of beta2 = 0.999 take a second moment to 0.606 of itself; rounded to nearest it would stay at 1."""

    def after(noise_of):
        moments, second = Moments(bits), torch.linspace(0.5, 1, 256).repeat(16)
        start, state = second, moments.zeros(second)
        for step in range(500):
            for _, _, held in moments.walk(state, [(0, len(second))], second.device):
                moments.store(held, torch.zeros_like(second), second, noise_of(step))
                second = moments.load(held)[1]
            second = torch.where(torch.arange(len(second)) % GROUP == 255, 1.0, second * 0.999)
        return (second / start)[torch.arange(len(second)) % GROUP < 250]

    nearest = torch.full((4096,), 2**15).bitwise_or(2**31).int()  # a chance of one half in both halves
    assert after(lambda step: nearest).mean() > 0.95
    arrived = after(lambda step: random_noise(4096, step))
    # a walk of 500 steps, each of sigma sqrt(0.001 * gap) with gap 0.02: 0.1; over 4,000 elements 0.0016, 5 of them
    assert abs(arrived.mean() - 0.999**500) < 0.008


def test_positive_second_moments_stay_positive_and_zeros_zero():
    second = torch.tensor([1.0, 1e-30, 0.0, 1e-12] + [0.0] * 252 + [0.0] * 256 + [3e-35, 0.0])
    for noise in (torch.zeros(514).int(), torch.full((514,), -1).int(), random_noise(514, 0)):
        state, first, loaded = store_and_load(Moments(8), torch.zeros(514), second, noise)
        assert torch.equal(loaded > 0, second > 0)
        assert not first.any()
    assert state["exp_avg_sq_scale"].shape == (3,)  # the last group has 2 elements


def test_codes_read_back_are_written_the_same():
    """What has a code of its own keeps it under any noise: a step without news changes no bit."""
    moments = Moments(8)
    codes = torch.arange(256)
    state = moments.zeros(torch.zeros(256)) | {
        "exp_avg_scale": torch.tensor([0.37]),
        "exp_avg_sq_scale": torch.tensor([5e-9]),
    }
    state["exp_avg"].copy_(codes - 128).clamp_(min=-127)
    state["exp_avg_sq"].copy_(codes)
    before = {name: t.clone() for name, t in state.items()}
    for seed in range(20):
        for _, _, held in moments.walk(state, [(0, 256)], codes.device):
            moments.store(held, *moments.load(held), random_noise(256, seed))
        changed = [(state[name].int() - before[name].int()).abs() for name in ("exp_avg", "exp_avg_sq")]
        # float32 puts a value up to 1e-5 of a gap beside its code: in 10,240 draws 0.1 are expected to move
        assert sum(int((c > 0).sum()) for c in changed) <= 1
        assert state["exp_avg_sq_scale"].item() == pytest.approx(5e-9, rel=1e-6)


def test_noise_of_zero_does_not_round_all_up():
    """A chance of 0 would: half of the codes come back from float32 a little above themselves (a tenth at most now)."""
    codes = torch.arange(256).float()
    values = (codes / 255) ** 4
    assert (_codes(values, SECOND_TOP, torch.zeros(256).int())[0] != codes).float().mean() < 0.1


@pytest.mark.parametrize("top", [FIRST_TOP, SECOND_TOP])
def test_codes_fit_their_bytes(top):
    """For zeros and the smallest numbers too; noise below its range stands for the worst of rounding errors."""
    for largest in (0.0, 1e-44, 1e-30, 1.0, 3e38):
        codes, scale = _codes(torch.linspace(0, largest, 256), top, torch.full((256,), -1).int())
        assert codes.isfinite().all()
        assert 0 <= codes.min() <= codes.max() <= top
        assert scale.isfinite().all()


@pytest.mark.parametrize(("bits", "num_bytes"), [(32, 8.0), (16, 4.0), (8, 2 + 8 / 256)])
@pytest.mark.parametrize("on_host", [False, True])
def test_bytes_of_an_element(bits, num_bytes, on_host):
    weight = torch.zeros(64, 1024, dtype=torch.bfloat16)
    assert tensor_bytes(Moments(bits, on_host).zeros(weight).values()) == num_bytes * weight.numel()


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("on_host", [False, True])
def test_a_walk_visits_each_span_once_and_writes_it_back(bits, on_host):
    moments, n = Moments(bits, on_host), 1000
    state = moments.zeros(torch.zeros(n))
    spans = [(0, 512), (512, 1000)]
    seen = []
    for start, stop, held in moments.walk(state, spans, torch.device("cpu")):
        seen.append((start, stop))
        first, second = moments.load(held)
        assert first.dtype == second.dtype == torch.float32
        moments.store(held, first + start + 1, second + stop, random_noise(stop - start, 0))
    assert seen == spans
    for span in spans:
        for start, _stop, held in moments.walk(state, [span], torch.device("cpu")):
            first, second = moments.load(held)
            # of a constant span the 8-bit values are exact: each is its group's largest
            torch.testing.assert_close(first, torch.full_like(first, start + 1), rtol=2**-7, atol=0)
            torch.testing.assert_close(second, torch.full_like(second, span[1]), rtol=2**-7, atol=0)


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("on_host", [False, True])
def test_all_of_it_runs_on_meta(bits, on_host):
    moments, weight = Moments(bits, on_host), torch.zeros(1000, device="meta")
    state = moments.zeros(weight)
    for start, stop, held in moments.walk(state, [(0, 512), (512, 1000)], weight.device):
        first, second = moments.load(held)
        assert first.shape == second.shape == (stop - start,)
        moments.store(held, first, second, torch.zeros(stop - start, dtype=torch.int32, device="meta"))


def test_other_bits_are_refused():
    with pytest.raises(UserError, match="state_bits is 4: choose 32, 16 or 8"):
        Moments(4)
