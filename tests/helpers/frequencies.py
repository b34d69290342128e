"""Whether counts go with chances, by exact tails: no test of a fixed seed ever flakes, and none needs a tolerance."""

import math
from collections import Counter


def plausible(count, num_trials, chance, level=1e-4):
    """Whether a fair experiment strays this far from num_trials * chance more often than ``level``."""
    if chance in (0.0, 1.0):
        return count == num_trials * chance

    def log_mass(k):
        choose = math.lgamma(num_trials + 1) - math.lgamma(k + 1) - math.lgamma(num_trials - k + 1)
        return choose + k * math.log(chance) + (num_trials - k) * math.log1p(-chance)

    low = sum(math.exp(log_mass(k)) for k in range(count + 1))
    high = sum(math.exp(log_mass(k)) for k in range(count, num_trials + 1))
    return 2 * min(low, high) > level


def assert_frequencies(sampler, num_intervals=4_000, first=0):
    """Each layer is active as often as the sampler says."""
    counts = Counter(layer for i in range(first, first + num_intervals) for layer in sampler(i))
    for layer, chance in enumerate(sampler.inclusion(first)):
        assert plausible(counts[layer], num_intervals, chance), (layer, counts[layer], chance * num_intervals)
