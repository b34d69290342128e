"""LISA itself: which parameters ask for gradients, and which hold optimizer state."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import nn

from lisatune.errors import UserError
from lisatune.layers import Layers, Trains
from lisatune.optim.suited import Optimizers, check_suited, drop_state, each_of, move_state, state_device
from lisatune.samplers.base import Sampler
from lisatune.samplers.scores import gradient_sq_norms

StatePolicy = Literal["reset_layers", "reset_all", "keep"]


class LisaEngine:
    """Every ``interval_steps`` steps, train the decoder layers that ``sampler`` draws and freeze the others.

    The embedding, the head and the rest of the text model train in every step, unless you say otherwise. Only the
    engine sets ``requires_grad``. Only the engine drops or moves optimizer state. What is frozen has no gradient, no
    optimizer state and no weight decay, and its bytes do not change. Which layers are active depends on the number of
    the step and on the sampler's fields.

    Args:
        layers: The model, as ``find_layers`` sees it.
        sampler: Interval number to layers, for example ``UniformSampler``.
        interval_steps: Optimizer steps between two draws (the paper's K), at least 1.
        state_policy: What happens to optimizer state at a switch. ``reset_layers``: a layer that is frozen loses its
            state, and a layer that stays active keeps it. ``reset_all``: all state is dropped, that of the embedding
            and the head too. ``keep``: the state of a frozen layer moves to the CPU and
            comes back with the layer.
        train_embedding: False freezes the input embedding and position embeddings. The backward pass then ends at the
            lowest active layer. ``"sampled"`` draws them like a layer: they train in the intervals that draw them.
        train_head: The same for the output embedding. Of a tied pair, both take the same value.
        train_outside: Whether what is outside the text model, such as a vision tower, trains in every step.
    Raises: UserError if ``interval_steps`` is less than 1, the sampler draws from another number of parts than there are
        (``layers.pool`` lists them), or embedding and head are one tensor of which only one is to train.
    Cost: a switch walks once over the parameters. Between switches, ``begin_step`` makes one comparison.
    Reference: Pan et al., LISA, arXiv:2403.17919. The paper does not say what happens to optimizer state at a switch.
    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lisatune import UniformSampler, find_layers
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32,
        ...                                      num_hidden_layers=4, num_attention_heads=2))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> engine = LisaEngine(find_layers(model), UniformSampler(num_layers=4, num_active=1, seed=0), interval_steps=2)
        >>> for step in range(4):
        ...     switched = engine.begin_step(step, optimizer)
        ...     ids = torch.arange(8)[None]
        ...     model(input_ids=ids, labels=ids).loss.backward()
        ...     optimizer.step(); optimizer.zero_grad()
        ...     print(switched, engine.active)
        True (0,)
        False (0,)
        True (3,)
        False (3,)
    """

    def __init__(
        self,
        layers: Layers,
        sampler: Sampler,
        interval_steps: int = 20,
        state_policy: StatePolicy = "reset_layers",
        *,
        train_embedding: Trains = True,
        train_head: Trains = True,
        train_outside: bool = False,
    ) -> None:
        if interval_steps < 1:
            raise UserError(f"interval_steps is {interval_steps}: choose at least 1")
        if state_policy not in get_args(StatePolicy):
            raise UserError(f"state_policy is '{state_policy}': choose one of {', '.join(get_args(StatePolicy))}")
        if layers.tied and train_embedding != train_head:
            raise UserError(
                "embedding and head are one tensor in this model: give train_embedding and train_head the same value"
            )
        if not isinstance(sampler, Sampler):
            raise UserError(f"{type(sampler).__name__} is not a sampler: let its class inherit from lisatune.Sampler")
        self.pool = layers.pool(train_embedding=train_embedding, train_head=train_head)
        if sampler.num_layers != len(self.pool):
            sampled = ", ".join(part for part in self.pool if not part.startswith("layers."))
            raise UserError(
                f"the sampler draws from {sampler.num_layers} layers, but the model has {len(layers.decoder)}"
                + (f" and {sampled} to draw" if sampled else "")
                + f": make it with num_layers={len(self.pool)}"
            )
        self.layers = layers
        self.train_embedding = train_embedding
        self.train_head = train_head
        self.train_outside = train_outside
        self.sampler = sampler
        self.interval_steps = interval_steps
        self.state_policy = state_policy
        self.drawn: tuple[int, ...] | None = None
        self._interval: int | None = None
        self._optimizers: tuple[torch.optim.Optimizer, ...] = ()
        self._asked: dict[nn.Parameter, bool] = {}

    @property
    def active(self) -> tuple[int, ...] | None:
        """The decoder layers that train now; None before the first step."""
        return None if self.drawn is None else self._layers_of(self.drawn)

    def active_at(self, step: int) -> tuple[int, ...]:
        """The decoder layers that train in optimizer step ``step`` (from 0)."""
        return self._layers_of(self.sampler(step // self.interval_steps))

    def trained_parts(self, drawn: tuple[int, ...]) -> set[str]:
        """The parts that train while ``drawn``, indices of ``pool``, are active."""
        parts = self.layers.trained_parts(drawn, train_embedding=self.train_embedding, train_head=self.train_head)
        return parts | {"outside"} if self.train_outside else parts

    def _layers_of(self, drawn: tuple[int, ...]) -> tuple[int, ...]:
        """The whole decoder layers among what was sampled."""
        numbers = [self.pool[i].removeprefix("layers.") for i in drawn]
        return tuple(int(number) for number in numbers if number.isdecimal())

    @property
    def interval(self) -> int | None:
        """The number of the interval; None before the first step."""
        return self._interval

    def scores(self) -> dict[int, float]:
        """The mean squared gradient of each active part, for a sampler that learns; empty and free for other samplers.

        Call it after the backward pass, before anything changes gradients. Give it to ``observe`` if the step is made.
        """
        return gradient_sq_norms(self.layers, self.pool, mean=True) if self.sampler.learns else {}

    def observe(self, step: int, scores: dict[int, float]) -> None:
        """Tell the sampler, if it learns, the ``scores`` of optimizer step ``step``."""
        if self.sampler.learns:
            self.sampler.observe(step, scores)

    def begin_step(self, step: int, optimizer: Optimizers) -> bool:
        """Make the model ready for optimizer step ``step``; call once before the step's first forward.

        Args:
            step: Number of the optimizer step, from 0; not of the micro-batch.
            optimizer: One optimizer over all of the text model's parameters, or several that together hold them.
        Returns: Whether the set of layers was set anew.
        Raises: UserError if a parameter that is to be trained at some time is not held, or for an optimizer that cannot
            keep frozen layers as they are.
        """
        optimizers = each_of(optimizer)
        if optimizers != self._optimizers:
            self._check_optimizers(optimizers)
        interval = step // self.interval_steps
        if interval == self._interval:
            return False
        if self.state_policy == "reset_all" and step % self.interval_steps == 0:
            for one in optimizers:
                one.state.clear()
        self._train(interval, self.sampler(interval))
        return True

    def release(self) -> None:
        """Set ``requires_grad`` as it was before the first step. Call it when training ends."""
        for parameter, asked in self._asked.items():
            parameter.requires_grad_(asked)
        self._asked.clear()
        self._interval, self.drawn, self._optimizers = None, None, ()

    def resume(
        self, num_steps: int, drawn: tuple[int, ...] | None, optimizer: Optimizers,
        sampler_state: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Continue after ``num_steps`` steps. Call it before you restore optimizer state, then go on with ``begin_step``.

        Args:
            num_steps: Optimizer steps that are done, at least 1.
            drawn: ``drawn`` as it was then.
            optimizer: The same as for ``begin_step``.
            sampler_state: ``state_dict`` of a sampler that learns, as it was then.
        Raises: UserError if ``drawn`` is not what the sampler draws, so that the run would not go on as it began.
        """
        self._check_optimizers(each_of(optimizer))
        interval = (num_steps - 1) // self.interval_steps
        if sampler_state is not None:
            self.sampler.load_state_dict(sampler_state)
        if drawn != self.sampler(interval):
            raise UserError(
                f"the layers active at step {num_steps} were {drawn}, but the sampler now draws "
                f"{self.sampler(interval)}: give it the seed and the settings that it had"
            )
        assert drawn is not None
        self._train(interval, drawn)

    def _train(self, interval: int, drawn: tuple[int, ...]) -> None:
        """Unfreeze the parts that ``drawn`` names, and freeze all others."""
        self._interval, self.drawn = interval, drawn
        trained = self.trained_parts(self.drawn)
        if not self._asked:
            self._asked = {p: p.requires_grad for p in self.layers.model.parameters()}
        for part, parameters in self.layers.parts().items():
            for parameter in parameters.values():
                trains = part in trained and parameter.is_floating_point()
                parameter.requires_grad_(trains)
                if not trains:
                    parameter.grad = None
                for optimizer in self._optimizers:
                    self._place_state(optimizer, parameter)

    def _place_state(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
        if self.state_policy != "keep":
            if not parameter.requires_grad:
                drop_state(optimizer, parameter)
            return
        here = state_device(optimizer, parameter) if parameter.requires_grad else torch.device("cpu")
        move_state(optimizer, parameter, here)

    def _check_optimizers(self, optimizers: tuple[torch.optim.Optimizer, ...]) -> None:
        for optimizer in optimizers:
            check_suited(optimizer, self.state_policy)
        known = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        ever = self.trained_parts(tuple(range(len(self.pool))))
        for part, parameters in self.layers.parts().items():
            missing = [name for name, p in parameters.items() if p.is_floating_point() and id(p) not in known]
            if part in ever and missing:
                raise UserError(_not_held(missing[0], part, frozen=not parameters[missing[0]].requires_grad))
        self._optimizers = optimizers


def _not_held(name: str, part: str, *, frozen: bool) -> str:
    text = f"the optimizer does not hold {name}, so it would never train: "
    if frozen:
        text += "it was frozen before; call model.requires_grad_(True), then make the optimizer over model.parameters()"
    else:
        text += "make the optimizer over model.parameters() before anything is frozen, and give begin_step all optimizers in a list"
    return text + (f", or set train_{part}=False" if part in ("embedding", "head") else "")
