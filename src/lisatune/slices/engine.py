"""LISA by slices: in each interval one block of rows or columns, or a few, of every matrix trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lisatune.engine import StatePolicy
from lisatune.errors import UserError
from lisatune.layers import Layers, Trains
from lisatune.memory.blocks import NAME, Cut, SliceOf, Slots, cut_of
from lisatune.optim.factored import is_factored
from lisatune.optim.suited import Optimizers, check_suited, drop_state, each_of, state_device
from lisatune.processes.tensors import is_sharded
from lisatune.samplers import SAMPLERS
from lisatune.samplers.base import Sampler
from lisatune.samplers.draws import hashed
from lisatune.samplers.fixed import FixedSampler
from lisatune.samplers.round_robin import RoundRobinSampler
from lisatune.slices.modules import SlicedForward
from lisatune.slices.shards import ShardedCut

USUAL_NUM_SLICES = 15


def usual_num_slices(num_layers: int) -> int:
    """15, or half of the number of decoder layers if that is less: then a slice is the share that two layers are.

    Example:
        >>> [usual_num_slices(num_layers) for num_layers in (1, 6, 16, 32, 80)]
        [2, 3, 8, 15, 15]
    """
    return min(USUAL_NUM_SLICES, max(2, num_layers // 2))


class SliceEngine:
    """Every ``interval_steps`` steps, train the blocks that ``sampler`` draws of each tensor, and freeze all other rows.

    ``LisaEngine`` trains a few layers whole. This engine trains a part of every layer. Each matrix of the text model is
    cut into blocks of rows, or of columns. Each matrix has its own order of blocks, made from the sampler's seed and the
    matrix's number. The parameter of a block is a view of it. Nothing is copied, and only the block gets a gradient. At
    its first step, the engine replaces the whole parameters by these in the optimizer's groups.

    A linear layer's columns belong to its inputs. A block of them needs only its share of the layer's input in the
    backward pass. (Transformers' ``Conv1D``, as GPT-2 has it, stores inputs as rows.) Columns are not contiguous in
    memory, so an optimizer that takes them for contiguous is refused.

    What is frozen has no gradient, no optimizer state, no weight decay, and its bytes do not change.

    Weights in shards are for ``lisatune train``, which also sums their gradients: see ``ShardedCut``.

    Args:
        layers: The model, as ``find_layers`` sees it, with contiguous parameters.
        sampler: Draws from the blocks of one tensor: ``SweepSampler(num_layers=15, num_active=1)`` cuts each into 15 and
            trains each block once in 15 intervals. Also ``UniformSampler``, ``RoundRobinSampler``, ``FixedSampler``.
        interval_steps: Optimizer steps between two draws, at least 1.
        state_policy: The same as in ``LisaEngine``, for blocks in place of layers.
        train_embedding: ``"sampled"`` cuts the embedding like any matrix; True trains it whole in every step; False
            freezes it.
        train_head: The same for the head. Of a tied pair, both take the same value.
        train_norms: The same for all vectors: norms and biases. If they train, the backward pass needs the input of each norm.
        slices_of: ``"rows"`` or ``"columns"``: what the blocks of the decoder layers' matrices are made of. Those of
            embedding and head are rows, which are tokens.
        slow: Make every gradient whole and throw away the rows that do not train. For tests.
    Raises: UserError for another sampler, and for what ``LisaEngine`` refuses.
    Cost: a switch is about 10 microseconds for each tensor of the model.
    Reference: Pan et al., LISA, arXiv:2403.17919, for the idea; ChunkFT, arXiv:2605.21177, for gradients of parts of tensors.
    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lisatune import find_layers
        >>> from lisatune.samplers.sweep import SweepSampler
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32,
        ...                                      num_hidden_layers=4, num_attention_heads=2))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> engine = SliceEngine(find_layers(model), SweepSampler(num_layers=4, num_active=1, seed=0))
        >>> for step in range(4):
        ...     switched = engine.begin_step(step, optimizer)
        ...     ids = torch.arange(8)[None]
        ...     model(input_ids=ids, labels=ids).loss.backward()
        ...     optimizer.step(); optimizer.zero_grad()
        ...     print(switched, engine.drawn, engine.num_trainable())
        True (0,) 3072
        True (2,) 3072
        True (3,) 3072
        True (1,) 3072
    """

    def __init__(
        self,
        layers: Layers,
        sampler: Sampler,
        interval_steps: int = 1,
        state_policy: StatePolicy = "reset_layers",
        *,
        train_embedding: Trains = "sampled",
        train_head: Trains = "sampled",
        train_norms: Trains = False,
        slices_of: SliceOf = "rows",
        slow: bool = False,
    ) -> None:
        if interval_steps < 1:
            raise UserError(f"interval_steps is {interval_steps}: choose at least 1")
        if state_policy not in get_args(StatePolicy):
            raise UserError(f"state_policy is '{state_policy}': choose one of {', '.join(get_args(StatePolicy))}")
        if slices_of not in get_args(SliceOf):
            raise UserError(f"slices_of is '{slices_of}': choose one of {', '.join(get_args(SliceOf))}")
        if layers.tied and train_embedding != train_head:
            raise UserError(
                "embedding and head are one tensor in this model: give train_embedding and train_head the same value"
            )
        if not (isinstance(sampler, Sampler) and sampler.for_slices):
            choices = ", ".join(kind.__name__ for kind in SAMPLERS.values() if kind.for_slices)
            raise UserError(f"{type(sampler).__name__} cannot sample slices: choose {choices}")

        # what was asked for
        self.layers = layers
        self.sampler = sampler
        self._num_active: int = sampler.num_active  # type: ignore[attr-defined]  # ``for_slices`` says so
        self.interval_steps = interval_steps
        self.state_policy = state_policy
        self.slices_of = slices_of
        self.pool = tuple(f"slices.{block}" for block in range(sampler.num_layers))
        self.trains: dict[str, Trains] = {"embedding": train_embedding, "head": train_head, "norms": train_norms}

        # the tensors: cut into blocks, or trained whole in every step; and what is sampled now
        self.cuts: dict[str, Cut] = {}
        self.samplers: dict[str, Sampler] = {}
        self.always: dict[str, nn.Parameter] = {}
        self.drawn: tuple[int, ...] | None = None
        self._interval: int | None = None
        self._slow = slow
        self._optimizers: tuple[torch.optim.Optimizer, ...] = ()
        self._asked: dict[nn.Parameter, bool] = {}
        self._kept: dict[tuple[str, int], dict[str, Any]] = {}
        for number, (name, (part, parameter)) in enumerate(self._tensors().items()):
            of: SliceOf = "rows" if part in ("embedding", "head") else slices_of
            self._sort(number, name, parameter, self.trains_as(part, parameter), of)
        ever = self.cuts.keys() | self.always.keys()
        self._trained_parts = {part for part, names in layers.parts().items() if ever & names.keys()}

    def trains_as(self, part: str, parameter: Tensor) -> Trains:
        """Whether a tensor of ``part`` trains in slices, whole or never."""
        if part in ("outside", "fixed") or not parameter.is_floating_point():
            return False
        if parameter.ndim < 2:
            return self.trains["norms"]
        return self.trains.get(part, "sampled")

    @property
    def active(self) -> tuple[int, ...] | None:
        """The decoder layers that train now: all, a slice of each; None before the first step."""
        return None if self.drawn is None else tuple(range(len(self.layers.decoder)))

    @property
    def interval(self) -> int | None:
        """The number of the interval; None before the first step."""
        return self._interval

    def trained_parts(self, drawn: tuple[int, ...]) -> set[str]:
        """The parts that train: the same at any time, whatever is ``drawn``."""
        return self._trained_parts

    def num_trainable(self) -> int:
        """Parameters that train now, before the first step in the first interval."""
        always = sum(p.numel() for p in self.always.values())
        return always + sum(
            cut.num_elements(self.samplers[name](self._interval or 0)) for name, cut in self.cuts.items()
        )

    def describe(self) -> str:
        """What trains and what does not, in one line."""
        when: dict[Trains, list[str]] = {"sampled": ["all matrices"], True: [], False: []}
        for part, trains in self.trains.items():
            when[trains].append("norms and biases" if part == "norms" else part)
        steps = "1 step" if self.interval_steps == 1 else f"{self.interval_steps} steps"
        text = f"{self._num_active} of {len(self.pool)} slices of each tensor train at a time, for {steps}"
        text += f" ({', '.join(when['sampled'])})"
        text += f"; {', '.join(when[True])} train whole in every step" if when[True] else ""
        return text + (f"; {', '.join(when[False])} never" if when[False] else "")

    def scores(self) -> dict[int, float]:
        """Empty: no sampler of slices learns."""
        return {}

    def observe(self, step: int, scores: dict[int, float]) -> None:
        """Do nothing: no sampler of slices learns."""

    def begin_step(self, step: int, optimizer: Optimizers) -> bool:
        """Make the model ready for optimizer step ``step``; call once before the step's first forward.

        Args:
            step: Number of the optimizer step, from 0; not of the micro-batch.
            optimizer: One optimizer over all of the text model's parameters, or several that together hold them.
        Returns: Whether the blocks were set anew.
        Raises: UserError if a parameter that is to be trained at some time is not held, or for an optimizer that cannot
            keep frozen rows as they are.
        """
        if each_of(optimizer) != self._optimizers:
            self.adopt(optimizer)
        interval = step // self.interval_steps
        if interval == self._interval and all(cut.is_in_place() for cut in self.cuts.values()):
            return False
        if self.state_policy == "reset_all" and interval != self._interval and step % self.interval_steps == 0:
            for one in self._optimizers:
                one.state.clear()
        self._place(interval)
        return True

    def draw_most(self) -> None:
        """For a forecast, before the first step: draw as many blocks in each interval as are ever drawn.

        A sweep whose blocks do not divide evenly has smaller draws.
        """
        if not isinstance(self.sampler, FixedSampler):
            self.sampler = RoundRobinSampler(len(self.pool), self._num_active, descending=True)
            self.samplers = dict.fromkeys(self.samplers, self.sampler)

    def release(self) -> None:
        """Put the whole parameters back into the model. Call it when training ends."""
        for parameter, asked in self._asked.items():
            parameter.requires_grad_(asked)
        self._asked.clear()
        wholes = {id(slot): cut.weight for cut in self.cuts.values() for slot in cut.slots}
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                own = dict.fromkeys(wholes.get(id(p), p) for p in group["params"])
                group["params"][:] = list(own)
        for module in list(self.layers.model.modules()):
            if isinstance(module.forward, SlicedForward):
                module.forward.remove()
                del module._modules[NAME]
        for cut in self.cuts.values():
            cut.empty()
        self._interval, self.drawn, self._optimizers = None, None, ()

    def resume(
        self, num_steps: int, drawn: tuple[int, ...] | None, optimizer: Optimizers,
        sampler_state: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Continue after ``num_steps`` steps, as ``LisaEngine.resume`` does.

        Raises: UserError if ``drawn`` is not what the sampler draws, since the run would then not continue as it began.
        """
        self.adopt(optimizer)
        interval = (num_steps - 1) // self.interval_steps
        if drawn != self.sampler(interval):
            raise UserError(
                f"the slices active at step {num_steps} were {drawn}, but the sampler now draws "
                f"{self.sampler(interval)}: give it the seed and the settings that it had"
            )
        self._place(interval)

    def adopt(self, optimizer: Optimizers) -> None:
        """Put the blocks' parameters into the model, and where the optimizer holds the whole ones.

        ``begin_step`` does so at its first call. Call it before if something looks at the optimizer's parameters before.
        """
        optimizers = each_of(optimizer)
        for one in optimizers:
            check_suited(one, self.state_policy, strided=self.slices_of == "columns")
        if not self._asked:
            self._asked = {p: p.requires_grad for p in self.layers.model.parameters()}
            self._put_into_modules()
        slots = {id(cut.weight): cut.slots for cut in self.cuts.values()}
        ours = {id(slot) for own in slots.values() for slot in own}
        held = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
        self._check_held(held)
        for one in optimizers:
            for group in one.param_groups:
                if any(id(p) in slots for p in group["params"]):  # one made after the engine has begun holds slots too
                    others = [p for p in group["params"] if id(p) not in ours]
                    group["params"][:] = [new for p in others for new in slots.get(id(p), [p])]
            for cut in self.cuts.values():
                one.state.pop(cut.weight, None)
        self._optimizers = optimizers

    def _check_held(self, held: set[int]) -> None:
        missing = [name for name, p in self.always.items() if id(p) not in held]
        missing += [name for name, cut in self.cuts.items() if not held & {id(cut.weight), id(cut.slots[0])}]
        if missing:
            raise UserError(
                f"the optimizer does not hold {missing[0]} ({len(missing)} parameters are missing), so it would never "
                "train: make the optimizer over model.parameters() before anything is frozen, and give begin_step all optimizers "
                "in a list"
            )

    def states(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> dict[str, tuple[Tensor, dict[str, Any]]]:
        """Optimizer state of ``parameters``, by names, with its owner: of slices ``NAME[BLOCK]``, kept ones too.

        A factored second moment is of all slices together, and has the name of the parameter.
        """
        found: dict[str, tuple[Tensor, dict[str, Any]]] = {}
        for name, parameter in parameters.items():
            cut = self.cuts.get(name)
            if cut is None:
                found[name] = parameter, optimizer.state.get(parameter, {})
                continue
            together = optimizer.state.get(cut.slots[0], {})
            if is_factored(together):  # of all slices at once
                found[name] = parameter, together
                continue
            for slot, block in zip(cut.slots, cut.blocks or (None,) * len(cut.slots), strict=True):
                if block is not None:
                    found[f"{name}[{block}]"] = slot, optimizer.state.get(slot, {})
        found |= {f"{n}[{block}]": (parameters[n], s) for (n, block), s in self._kept.items() if n in parameters}
        return found

    def place_state(
        self, name: str, saved: dict[str, Any], place: Callable[[nn.Parameter, dict[str, Any]], None]
    ) -> None:
        """Put the saved state of the slice ``NAME[BLOCK]``, or of all slices of ``NAME``, where it belongs; ``place`` gives a parameter its state.

        Raises: KeyError if there is no such slice, or it neither trains nor is kept.
        """
        tensor, _, number = name.removesuffix("]").partition("[")
        if not number:
            place(self.cuts[tensor].slots[0], saved)
            return
        cut, block = self.cuts[tensor], int(number)
        if block in cut.blocks:
            place(cut.slots[cut.blocks.index(block)], saved)
        elif self.state_policy == "keep" and block < cut.num_slices:
            self._kept[tensor, block] = saved
        else:
            raise KeyError(name)

    def _tensors(self) -> dict[str, tuple[str, nn.Parameter]]:
        return {name: (part, p) for part, own in self.layers.parts().items() for name, p in own.items()}

    def _sort(self, number: int, name: str, parameter: nn.Parameter, trains: Trains, of: SliceOf) -> None:
        if trains is True:
            self.always[name] = parameter
        elif trains == "sampled":
            if not parameter.is_contiguous():
                raise UserError(f"{name} is not contiguous, so it cannot be cut: make it from .contiguous()")
            if cut_of(parameter) is not None:
                raise UserError("slices of this model train already: call release() of the other engine first")
            blocks = self.sampler.num_layers, self._num_active, of
            if is_sharded(parameter):
                module = self.layers.model.get_submodule(name.rpartition(".")[0])
                self.cuts[name] = ShardedCut(name, parameter, *blocks, module)
            else:
                self.cuts[name] = Cut(name, parameter, *blocks)
            seeded: Any = self.sampler
            if hasattr(seeded, "seed"):
                seeded = dataclasses.replace(seeded, seed=hashed(seeded.seed, 0, number))
            self.samplers[name] = seeded

    def _put_into_modules(self) -> None:
        of = {id(cut.weight): cut for cut in self.cuts.values()}
        put: set[int] = set()  # one module of a tied pair holds the slots
        for module in list(self.layers.model.modules()):
            own = {name: of[id(p)] for name, p in module._parameters.items() if p is not None and id(p) in of}
            if own:
                module.forward = SlicedForward(module, self._slow)  # type: ignore[assignment]
                for cut in own.values():
                    cut.weight.cut_into = cut  # type: ignore[attr-defined]
                new = {id(cut): cut for cut in own.values() if id(cut) not in put}
                module.add_module(NAME, Slots(own, [slot for cut in new.values() for slot in cut.slots]))
                put |= new.keys()

    def _place(self, interval: int) -> None:
        """Unfreeze the blocks of ``interval``, and freeze all others."""
        if self._interval is None:
            for name, (_, parameter) in self._tensors().items():
                parameter.requires_grad_(name in self.always)
        self._interval, self.drawn = interval, self.sampler(interval)
        for name, cut in self.cuts.items():
            blocks = self.samplers[name](interval)
            for optimizer in self._optimizers:
                self._move_state(name, cut, blocks, optimizer)
            cut.place(blocks)

    def _move_state(self, name: str, cut: Cut, blocks: tuple[int, ...], optimizer: torch.optim.Optimizer) -> None:
        """Drop or put by the state of blocks that leave, and bring back that of blocks that come."""
        was = cut.blocks or (None,) * len(cut.slots)
        for slot, old, new in zip(cut.slots, was, cut.arranged(blocks), strict=True):
            if old == new:
                continue
            state = optimizer.state.get(slot)
            if state and is_factored(state):  # it is that of all slices of the tensor
                continue
            drop_state(optimizer, slot)
            if self.state_policy != "keep" or slot not in self._holders(optimizer):
                continue
            if state and old is not None:
                self._kept[name, old] = {key: _on(value, torch.device("cpu")) for key, value in state.items()}
            if new is not None and (came := self._kept.pop((name, new), None)):
                device = state_device(optimizer, slot)
                optimizer.state[slot] = {key: _on(value, device) for key, value in came.items()}

    @staticmethod
    def _holders(optimizer: torch.optim.Optimizer) -> set[nn.Parameter]:
        return {p for group in optimizer.param_groups for p in group["params"]}


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) and value.ndim else value
