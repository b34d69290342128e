"""MeZO: steps without a backward pass, in the memory of an evaluation."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lisatune.data.loader import Batch
from lisatune.errors import UserError
from lisatune.layers import Layers
from lisatune.loss import batch_loss
from lisatune.methods.base import Method
from lisatune.optim.rounded import RoundedOptimizer

if TYPE_CHECKING:
    from lisatune.learner import Learner

BLOCK = 2**22  # elements of noise that exist at a time: 16 MiB


@dataclass(kw_only=True)
class Mezo(Method):
    """Trains all weights by ``ZerothOrder``, without a backward pass. The arguments are settings."""

    learning_rate: float
    mezo_epsilon: float
    mezo_directions: int
    seed: int
    prober: ZerothOrder = field(init=False, repr=False)

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer that goes along random directions."""
        self.prober = ZerothOrder(
            self.layers, groups, lr=self.learning_rate, epsilon=self.mezo_epsilon, num_directions=self.mezo_directions,
            seed=self.seed, linear_head=self.linear_head,
        )  # fmt: skip
        return self.prober.optimizer

    def begin_step(self, number: int, optimizer: torch.optim.Optimizer) -> bool:
        """The directions depend on the number of the step."""
        self.prober.optimizer.number = number
        return False

    def gradients(self, learner: Learner, micro_batches: Iterable[Batch], num_labelled: int) -> tuple[Tensor, Tensor]:
        """Loss, and root mean square of the slopes, which are not clipped."""
        return self.prober.probe(
            self.prober.optimizer.number, micro_batches, num_labelled, total=learner.placement.total
        )


class RandomDirections(RoundedOptimizer):
    """SGD along random directions, each known by its seed and a slope::

        p -= lr * (weight_decay * p + mean(slope * z for slope, z in ...))

    z is standard normal in float32, made when it is needed, ``BLOCK`` elements at a time. It depends on ``seed``, the
    number of the step, the number of the direction, the parameter's place in the optimizer and on the kind of device,
    and on nothing else: not on the type of the weights, nor on what else trains. A CPU and a CUDA device draw other
    noise, each with torch's own generator: ``random_bits`` would give both the same, but reads and writes its elements
    14 times, before they are normal, where a generator writes them once.

    There is no state: ``optimizer.state`` is empty, and a resumed run needs the number of the step alone.

    Args:
        params: Parameters or groups. Those that ask for a gradient take part, so LISA may freeze and thaw them.
        lr: Learning rate; 1e-7 to 1e-6 for a whole model in the paper, which is constant there.
        weight_decay: Decoupled, a share of the weight for each unit of learning rate.
        seed: Seed of the directions, and of the rounding of bfloat16 weights.
    Attributes:
        number: Number of the step.
        slopes: Slopes along its directions, float32, shape (number of directions,).
    """

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float = 0.0, *, seed: int = 0) -> None:
        self.number = 0
        self.slopes = torch.zeros(0)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, seed)

    def noise(self, p: Tensor, direction: int) -> Iterator[Tensor]:
        """The part of z that belongs to ``p``, float32, flat, ``BLOCK`` elements after ``BLOCK`` elements."""
        name = f"direction {self.seed} {self.number} {direction} {self.places[p]}"
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        generator = None if p.is_meta else torch.Generator(p.device).manual_seed(key)
        for start in _starts(p):
            yield torch.randn(min(BLOCK, p.numel() - start), generator=generator, device=p.device)

    @torch.no_grad()
    def moved(self, p: Tensor, direction: int, distance: float) -> Tensor:
        """A copy of ``p``, in its shape and dtype, moved ``distance`` times z."""
        copy = torch.empty_like(p)
        for start, z in zip(_starts(p), self.noise(p, direction), strict=True):
            part = slice(start, start + BLOCK)
            copy.view(-1)[part] = torch.add(
                p.detach().view(-1)[part], z, alpha=distance
            )  # computed in float32 if p is bfloat16
        return copy

    def update_group(self, group: dict[str, Any]) -> None:
        """Move what asks for a gradient."""
        shares = (self.slopes / len(self.slopes)).unbind()
        for p in group["params"]:
            if not p.requires_grad:
                continue
            streams = [self.noise(p, direction) for direction in range(len(shares))]
            for start in _starts(p):
                weight = p.detach().view(-1)[start : start + BLOCK].to(torch.promote_types(p.dtype, torch.float32))
                change = weight * group["weight_decay"]
                for share, stream in zip(shares, streams, strict=True):
                    change.addcmul_(next(stream), share)
                self.write(p, start, torch.add(weight, change, alpha=-group["lr"]), self.number)


def _starts(p: Tensor) -> range:
    return range(0, p.numel(), BLOCK)


class ZerothOrder:
    """Learns from two losses per direction, at ``p + epsilon * z`` and ``p - epsilon * z``; no graph, no gradient.

    The slope (loss(p + epsilon * z) - loss(p - epsilon * z)) / (2 * epsilon) times z is, on average over z, the gradient
    to the order of epsilon**2. But it is spread over all d parameters that take part: its norm is sqrt(d) times the
    gradient's, which is why learning rates are small and steps are many.

    The weights are not touched by a probe. Each module is called on copies of its parameters, moved as it is called and
    dropped as it returns: a decoder layer at a time, the embedding, the head. MeZO as published moves the weights in
    place, + - +, which gives them back with rounding errors: after 1,000 steps with epsilon = 1e-3, weights of standard
    deviation 0.02 are off by 12% in bfloat16, 1.6% in float16, 0.0002% in float32 (benchmarks/probe_drift.py).

    Args:
        layers: The model.
        parameters: Parameters or groups that may take part; those of them that ask for a gradient at a step do. With
            LISA's engine the active layers, with LoRA the adapters.
        lr: Learning rate, see ``RandomDirections``.
        weight_decay: See ``RandomDirections``.
        epsilon: How far a probe goes. In bfloat16 a weight that would move by less than half of its last digit stays:
            with 1e-3 most of those above 0.25, which are in norms and not in matrices.
        num_directions: Averaged over in a step; the noise falls with the root, the cost grows in proportion.
        seed: Seed of the directions.
        linear_head: ``layers.head_is_linear()``, if it is known.
    Attributes:
        optimizer: Holds learning rate and seed, and makes the update.
    Raises: UserError for an epsilon of 0 or less, or less than 1 direction.
    Cost: memory of an evaluation, plus copies of the largest of embedding, head and one decoder layer, as far as they
        take part, and 5 blocks of noise. Time of 2 forward passes a direction; noise is made once for each of them and
        micro-batch (of a tied embedding twice), and once for the update: on a CPU core 6 ns an element each time, 16 in
        the update of bfloat16. Micro-batches keep no activations, so they may be large.
    Reference: Malladi et al., Fine-Tuning Language Models with Just Forward Passes, arXiv:2305.17333; Spall, Multivariate
        Stochastic Approximation Using a Simultaneous Perturbation Gradient Approximation, 1992.
    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lisatune import find_layers
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32,
        ...                                      num_hidden_layers=4, num_attention_heads=2))
        >>> ids = torch.arange(8)[None]
        >>> batch = Batch(ids, ids.roll(-1, 1), ids, ids >= 0)
        >>> learner = ZerothOrder(find_layers(model), model.parameters(), lr=1e-5)
        >>> for step in range(3):
        ...     loss, slope = learner.step(step, [batch], batch.num_labelled)
        >>> loss.shape, any(p.grad is not None for p in model.parameters())
        (torch.Size([]), False)
    """

    def __init__(
        self,
        layers: Layers,
        parameters: Iterable[Any],
        *,
        lr: float,
        weight_decay: float = 0.0,
        epsilon: float = 1e-3,
        num_directions: int = 1,
        seed: int = 0,
        linear_head: bool | None = None,
    ) -> None:
        if epsilon <= 0:
            raise UserError(f"epsilon is {epsilon}: choose a number above 0, for example 1e-3")
        if num_directions < 1:
            raise UserError(f"num_directions is {num_directions}: choose at least 1")
        self.layers = layers
        self.linear_head = layers.head_is_linear() if linear_head is None else linear_head
        self.epsilon = epsilon
        self.num_directions = num_directions
        self.optimizer = RandomDirections(parameters, lr, weight_decay, seed=seed)
        called = [layers.embedding, *layers.decoder]
        self._modules = {module: self._held_by(module) for module in called}
        self._head = self._held_by(layers.head) if layers.head is not None else []
        elsewhere = {p for own in (*self._modules.values(), self._head) for p in own}
        self._rest = [p for p in self.optimizer.places if p not in elsewhere]

    def step(self, number: int, micro_batches: Iterable[Batch], num_labelled: int) -> tuple[Tensor, Tensor]:
        """Optimizer step ``number`` (from 0), at the learning rate that is set: ``probe``, then ``optimizer.step()``.

        Returns: The same as ``probe``.
        Raises: UserError if the loss is not finite; nothing has been updated then.
        """
        loss, slope = self.probe(number, micro_batches, num_labelled)
        if not (loss.is_meta or (math.isfinite(loss.item()) and math.isfinite(slope.item()))):
            raise UserError(
                f"step {number + 1}: the loss is {loss.item()} and its slope {slope.item()}, so the run was stopped; try a "
                "lower learning_rate or epsilon"
            )
        self.optimizer.step()
        return loss, slope

    @torch.no_grad()
    def probe(
        self, number: int, micro_batches: Iterable[Batch], num_labelled: int, *,
        total: Callable[[Tensor], Tensor] = lambda loss: loss,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Find the slopes of step ``number``, and leave them in ``optimizer``, for its next ``step``.

        Args:
            number: Number of the optimizer step, from 0.
            micro_batches: Batches on the model's device, all kept for the time of the step.
            num_labelled: Labelled tokens of all of them.
            total: Sums a loss over the processes, in place. All of them draw the same directions.
        Returns: Mean of all losses, and root mean square of the slopes, whose square is on average that of the
            gradient's norm; scalars, float32. The model is left in the mode that it was in; dropout is off meanwhile.
        Raises: UserError if no parameter asks for a gradient, or a module whose parameters do is not called.
        """
        if not any(p.requires_grad for p in self.optimizer.places):
            raise UserError(
                "no parameter requires a gradient, so nothing would train: set requires_grad for some before the step"
            )
        self.optimizer.number = number
        batches = list(micro_batches)
        losses, slopes = [], []
        with _evaluation_mode(self.layers.model):
            for direction in range(self.num_directions):
                above, below = (
                    self._loss_at(direction, distance, batches, num_labelled, total)
                    for distance in (self.epsilon, -self.epsilon)
                )
                losses.append((above + below) / 2)
                slopes.append((above - below) / (2 * self.epsilon))
        found = torch.stack(slopes)
        self.optimizer.slopes = found.float()
        return torch.stack(losses).mean().float(), found.square().mean().sqrt().float()

    def _loss_at(
        self,
        direction: int,
        distance: float,
        batches: list[Batch],
        num_labelled: int,
        total: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The loss when each parameter is moved; scalar, float64: the difference of two such is small."""
        with self._moved(direction, distance):
            losses = [batch_loss(self.layers, batch, num_labelled, linear_head=self.linear_head) for batch in batches]
        return total(torch.stack(losses).sum(dtype=torch.float64))

    @contextmanager
    def _moved(self, direction: int, distance: float) -> Iterator[None]:
        """While entered, modules are called on moved copies of their parameters.

        A tied head is moved apart from its embedding, by the same noise: it is one parameter.
        """

        def moved(p: Tensor) -> Tensor:
            return self.optimizer.moved(p, direction, distance)

        head, rest = _Swap("head", self._head, moved), _Swap("rest", self._rest, moved)
        swaps = [head, rest]
        trunk = self.layers.trunk_module
        # the head may be used without being called: from the end of the trunk to the next one's beginning
        handles = [trunk.register_forward_pre_hook(head.undo), trunk.register_forward_hook(head.do)]
        for module, parameters in self._modules.items():
            swap = _Swap(type(module).__name__, parameters, moved)
            swaps.append(swap)
            handles += [module.register_forward_pre_hook(swap.do), module.register_forward_hook(swap.undo)]
        try:
            rest.do()
            yield
        finally:
            for handle in handles:
                handle.remove()
            for swap in swaps:
                swap.undo()
        for swap in swaps:
            if not swap.done and any(p.requires_grad for p in swap.parameters):
                raise UserError(
                    f"{swap.name} was not called in the forward pass, so its parameters cannot be probed: set requires_grad=False for them"
                )

    def _held_by(self, module: nn.Module) -> list[Tensor]:
        return [p for p in module.parameters() if p in self.optimizer.places]


class _Swap:
    """Parameters with other values from ``do`` to ``undo``, which both serve as hooks; their own are put aside."""

    def __init__(self, name: str, parameters: list[Tensor], value: Callable[[Tensor], Tensor]) -> None:
        self.name = name
        self.parameters = parameters
        self.value = value
        self.done = False
        self._own: list[tuple[Tensor, Tensor]] = []

    def do(self, *_: Any) -> None:
        """Give those that ask for a gradient their other values."""
        self.done = True
        for p in self.parameters:
            if p.requires_grad:
                own, p.data = p.data, self.value(p)
                self._own.append((p, own))

    def undo(self, *_: Any) -> None:
        """Give them back their own; does nothing if they have them."""
        for p, own in self._own:
            p.data = own
        self._own.clear()


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
