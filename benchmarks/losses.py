"""The loss over a large vocabulary: this package's, torch's own in chunks, and the plain one that holds all logits.

python benchmarks/losses.py [--rounds 5]

Needs nothing. Each computes the same loss and both gradients, of hidden states and of the head's weight, by turns in one
process with one thread. A third of the tokens has a label, as in answers to questions; then the half; then all. The peak is what
PyTorch's CPU allocator gave out. Time is the processor's, as a ratio to the plain loss.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from results import markdown, write_page
from torch import Tensor, nn

from lisatune.loss import linear_cross_entropy
from lisatune.memory.measure import allocated_peak

CASES = ((1024, 576, 49152), (1024, 2048, 32000), (512, 2048, 128256))  # tokens, width, vocabulary
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """All logits at once."""
    return nn.functional.cross_entropy((hidden @ weight.T).float(), labels)


def torchs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Torch's own, in chunks of its choice."""
    options = nn.LinearCrossEntropyOptions()
    loss: Tensor = nn.functional.linear_cross_entropy(hidden, weight, labels, options=options)
    return loss


WAYS: dict[str, Loss] = {"plain": plain, "torch, in chunks": torchs, "lisatune": linear_cross_entropy}


def both_gradients(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The loss, with the gradients made and dropped."""
    value = loss(hidden, weight, labels)
    value.backward()  # type: ignore[no-untyped-call]
    hidden.grad = weight.grad = None  # here, since the profiler takes off what was given out before it began
    return value.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for tokens, width, vocabulary in CASES:
        for share in (3, 2, 1):
            torch.manual_seed(0)
            hidden = torch.randn(tokens, width).requires_grad_()
            weight = (0.02 * torch.randn(vocabulary, width)).requires_grad_()
            labels = torch.randint(vocabulary, (tokens,))
            labels[: tokens - tokens // share] = -100
            seconds: dict[str, list[float]] = {name: [] for name in WAYS}
            losses = {name: both_gradients(loss, hidden, weight, labels).item() for name, loss in WAYS.items()}
            peaks = {
                n: allocated_peak(partial(both_gradients, loss, hidden, weight, labels)) for n, loss in WAYS.items()
            }
            for _ in range(options.rounds):
                for name, loss in WAYS.items():
                    begun = time.process_time()
                    both_gradients(loss, hidden, weight, labels)
                    seconds[name].append(time.process_time() - begun)
            base = statistics.median(seconds["plain"])
            for name in WAYS:
                rows.append([f"{tokens:,} x {width:,}, {vocabulary:,}", f"1/{share}", name, f"{losses[name]:.6f}",
                             f"{statistics.median(seconds[name]) / base:.2f}", f"{peaks[name] / 2**20:,.0f}"])  # fmt: skip
                print(*rows[-1], sep=" | ", flush=True)
    head = ["tokens x width, vocabulary", "labelled", "loss of", "value", "time", "peak MiB"]
    print(
        write_page("losses", f"float32, medians of {options.rounds} rounds.\n\n{markdown(head, rows)}", __doc__ or "")
    )


if __name__ == "__main__":
    main()
