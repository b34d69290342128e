"""AdamW a block at a time: moments in few bytes, weights in bfloat16, gradients that never exist whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lisatune.errors import UserError
from lisatune.memory.blocks import elements, put_elements, whole_of
from lisatune.memory.bundles import bundles
from lisatune.optim.compiled import fits, no_more_than, numbers_of, update_block, update_stateless
from lisatune.optim.factored import Factored, factored_state, is_factored, owner_of, stacks
from lisatune.optim.moments import GROUP, Moments, Span, StateBits
from lisatune.optim.rounding import keys_of, random_bits, random_bits_of, round_stochastically, spread_of
from lisatune.optim.row_gradients import RowGradients
from lisatune.optim.spectral import spectral_step
from lisatune.processes.tensors import first_element, local

# On a CPU, 8-bit blocks of 2**20 take 0.8 of the time of 2**22, which leave its cache. Smaller ones are faster still
# (2**18: 0.6), but have many more waits of threads for each other, of 5 ms each when the cores are shared.
CPU_ELEMENTS = 2**20


class AdamW(torch.optim.Optimizer):
    """AdamW that updates a block of rows at a time, and rounds what does not fit up or down at random.

    A bfloat16 has 8 bits of mantissa. Rounding to nearest loses every update that is smaller than 1/512 of its weight,
    and at usual learning rates most updates are. Stochastic rounding keeps them on average, and needs no memory.
    With weights and moments in float32 this is ``torch.optim.AdamW``, to rounding::

        p -= lr * weight_decay * p
        m += (1 - beta1) * (g - m);  v += (1 - beta2) * (g * g - v)
        p -= lr / (1 - beta1**t) * m / (sqrt(v / (1 - beta2**t)) + eps)

    Args:
        params: Parameters or groups. Those without a gradient are skipped and get no state.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay, a share of the weight for each unit of learning rate.
        seed: Seed of the stochastic rounding. The noise of an element depends on the seed, the number of the step, the
            place of the parameter in the optimizer and the place of the element in the parameter. It depends on nothing
            else: not on block size, order of updates or device, nor on whether the run was resumed.
        state_bits: 32, 16 or 8 bits for each moment; ``Moments`` tells how.
        offload_state: Keep the moments in host memory, and copy those of one block at a time.
        row_gradients: Holds the gradients of embedding and head that are made a block at a time. They add to ``p.grad``.
        stateless: Keep no moments. Each step is then a first step, ``p -= lr * g / (abs(g) + eps)``: the sign of the
            gradient, or less where the gradient is small against ``eps``. A group of parameters may have this entry too.
        factored: Keep no first moment, and the second one in factors, as ``factored.Factored`` tells: a number for each row
            and each column. A group of parameters may have this entry too.
        spectral: Of a group of matrices without moments, or with factored ones: take ``spectral.spectral_step`` of what
            would be the step, at the same size.
        block_elements: The most elements of a block. It is rounded up to whole rows that end at a multiple of 256. On a
            CPU it is 2**20 at most, because more is slower.
        compiled: Compile the arithmetic of a block into one kernel, as ``compiled`` tells.
    Raises: UserError for other ``state_bits``, and for a parameter that is not contiguous.
    Cost: 8, 4 or 2.03 bytes of state for each element that trains, and about 8 float32 temporaries of a block: 128 MiB
        (on a CPU a quarter). On 2 CPU cores a step takes 1 ns for a float32 element. For a bfloat16 element it takes 4,
        8 or 12 ns with 32, 16 or 8 bits. The fused AdamW of torch takes 0.3 to 0.4 ns, and rounds bfloat16 to nearest.
    Reference: Loshchilov and Hutter, arXiv:1711.05101; Zamirai et al., Revisiting BFloat16 Training, arXiv:2010.06192.
    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        >>> optimizer = AdamW([weight], lr=1e-4, weight_decay=0.0)
        >>> for _ in range(10):
        ...     weight.grad = torch.ones_like(weight); optimizer.step()
        >>> 0.998 < weight.float().mean().item() < 1.0  # round to nearest would leave it at 1
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        seed: int = 0,
        *,
        state_bits: StateBits = 32,
        offload_state: bool = False,
        row_gradients: RowGradients | None = None,
        stateless: bool = False,
        factored: bool = False,
        spectral: bool = False,
        block_elements: int = 2**22,
        compiled: bool = False,
    ) -> None:
        self.seed = seed
        self.moments = Moments(state_bits, on_host=offload_state)
        self.row_gradients = RowGradients() if row_gradients is None else row_gradients
        self.block_elements = block_elements
        self.compiled = compiled
        self._places: dict[Tensor, tuple[int, int]] = {}  # parameter -> number of its group, and its own number
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "num_steps": 0}
        super().__init__(params, defaults | {"stateless": stateless, "factored": factored, "spectral": spectral})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The same as in ``torch.optim.Optimizer``."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not whole_of(p).is_contiguous():
                raise UserError(f"a parameter of shape {tuple(p.shape)} is not contiguous: make it from .contiguous()")
            group = self.param_groups[-1]
            if group["spectral"] and not (whole_of(p).ndim == 2 and (group["stateless"] or group["factored"])):
                raise UserError(
                    f"spectral=True is for matrices without moments, and this is a parameter of shape {tuple(p.shape)}: "
                    "give matrices a group of their own, with factored=True or stateless=True"
                )
            self._places[p] = len(self.param_groups) - 1, len(self._places)

    @property
    def state_device(self) -> torch.device | None:
        """The device of the moments: the CPU if they are offloaded, else None, which means the parameter's own."""
        return torch.device("cpu") if self.moments.on_host else None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient, and count the step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            together = []
            for p in group["params"]:
                if _at_once(group) and p.grad is not None and p not in self.row_gradients:
                    together.append(p)
                elif p.grad is not None or p in self.row_gradients:
                    self.update(p)
            self._update_together(group, together)
            group["num_steps"] += 1
        return loss

    @torch.no_grad()
    def update(self, p: Tensor, *, sq_norm: Tensor | None = None) -> None:
        """Update only ``p``, now. Call it once a step for each parameter, in any order, before ``step`` counts the step.

        Args:
            p: A parameter of this optimizer, with ``p.grad``, row gradients or both. They do not change.
            sq_norm: If given, the sum of the gradient's squares is added to it: scalar, float32, on the device of ``p``.
        """
        number, index = self._places[whole_of(p)]
        group = self.param_groups[number]
        if is_on("factored", group):
            self._update_factored([p], group, sq_norm)
            return
        if group["stateless"]:
            update = self._update_spectral if is_on("spectral", group) else self._update_stateless
            update(p, group, sq_norm)
            return
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())
            state.update(self.moments.zeros(local(p)))
        state["step"] += 1
        t = state["step"].item()
        beta1, beta2 = group["betas"]
        width, first_of_all = _width(p), first_element(p)
        noise = f"moments {self.seed} {group['num_steps']} {index}"

        # a block at a time: gradient, moments, weight, each in float32, then back to the types they are kept in
        for start, stop, moments in self.moments.walk(state, self._spans(local(p)), p.device):
            grad = self._gradient(p, start // width, stop // width).view(-1)
            if sq_norm is not None:
                sq_norm += torch.dot(grad, grad)
            if self.compiled and fits(start, stop):
                self._update_compiled(p, start, grad, moments, group, noise)
                continue
            first, second = self.moments.load(moments)
            first.lerp_(grad, 1 - beta1)
            second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            denominator = (second / (1 - beta2**t)).sqrt_().add_(group["eps"])
            weight = self._decayed(p, start, stop, group)
            weight.addcdiv_(first, denominator, value=-group["lr"] / (1 - beta1**t))
            del grad, denominator  # two blocks less while the rest is rounded
            self._write(p, start, weight, group)
            if self.moments.bits == 32:
                self.moments.store(moments, first, second, None)
            else:
                bits = random_bits(noise, first_of_all + start, first_of_all + stop, p.device)
                self.moments.store(moments, first, second, bits)

    def _update_compiled(
        self, p: Tensor, start: int, grad: Tensor, held: dict[str, Tensor], group: dict[str, Any], noise: str
    ) -> None:
        ((name, first),) = self._streams([p], group)
        weight = elements(local(p), start, start + len(grad))
        keys = [keys_of(name, first + start), keys_of(noise, first + start)]
        if p.is_meta:  # a forecast counts what the kernel holds
            torch.empty(no_more_than(self.moments.bits) * len(grad), dtype=torch.uint8, device=p.device)
        else:
            update_block(self.moments, weight, grad, held, numbers_of(group, self.state[p]["step"].item()), keys)
        if not p.is_contiguous():
            put_elements(p, start, weight)

    def _update_stateless(self, p: Tensor, group: dict[str, Any], sq_norm: Tensor | None) -> None:
        width = _width(p)
        for start, stop in self._spans(local(p)):
            grad = self._gradient(p, start // width, stop // width).view(-1)
            if sq_norm is not None:
                sq_norm += torch.dot(grad, grad)
            if self.compiled and p.dtype == torch.bfloat16:
                ((name, first),) = self._streams([p], group)
                block = elements(local(p), start, stop)
                self._update_compiled_stateless(block, grad, [(name, first + start, first + stop)], group)
                if not p.is_contiguous():
                    put_elements(p, start, block)
                continue
            weight = self._decayed(p, start, stop, group)
            weight.addcdiv_(grad, grad.abs().add_(group["eps"]), value=-group["lr"])
            del grad
            self._write(p, start, weight, group)

    def _update_factored(self, some: list[Tensor], group: dict[str, Any], sq_norm: Tensor | None = None) -> None:
        """Update parameters that ``stacks`` has found alike; one by itself a block at a time."""
        states = [self.state[owner_of(p)] for p in some]
        for p, state in zip(some, states, strict=True):
            if not state:
                state.update(factored_state(p))
        p, width = some[0], _width(some[0])
        moment, spans = Factored(some, states), self._spans(p) if len(some) == 1 else [(0, p.numel())]
        rows = [(start // width, stop // width) for start, stop in spans]
        for first, last in rows:
            moment.add(self._gradients(some, first, last), first)
        if sq_norm is not None:
            sq_norm += moment.sq_norm()
        moment.advance(group["betas"][1])
        whole = None
        if is_on("spectral", group):
            step = moment.step(self._gradients(some, 0, p.numel() // width), 0, group["eps"], bounded=False)
            size = step.square().mean((1, 2), keepdim=True).sqrt()
            whole = spectral_step(step.to(p.dtype)).float().mul_(size)  # as exactly as the weights can take it
            del step
        for (start, _), (first, last) in zip(spans, rows, strict=True):
            if whole is None:
                step = moment.step(self._gradients(some, first, last), first, group["eps"])
            else:
                step = whole[:, first:last]
            self._move(some, start, step.flatten(1), group)

    def _move(self, some: list[Tensor], start: int, steps: Tensor, group: dict[str, Any]) -> None:
        """Take ``steps``, one for each of the parameters, float32, (N, n), of the elements from ``start`` on."""
        p, stop = some[0], start + steps.shape[1]
        complete = steps.shape[1] == p.numel()
        blocks = [local(p).detach() if complete else elements(local(p), start, stop) for p in some]
        weight = (torch.stack(blocks) if len(some) > 1 else blocks[0][None]).float()
        weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(steps.view(weight.shape), alpha=-group["lr"])
        if p.dtype == torch.bfloat16:
            noise = [(name, first + start, first + stop) for name, first in self._streams(some, group)]
            bits = random_bits_of(noise, p.device).bitwise_and_(0xFFFF)
            weight = round_stochastically(weight.view(-1), bits).view(weight.shape)
        if len(some) > 1 or p.dtype != torch.float32:
            torch._foreach_copy_(blocks, list(weight))
        if not complete and not p.is_contiguous():
            put_elements(local(p), start, blocks[0])

    def _update_spectral(self, p: Tensor, group: dict[str, Any], sq_norm: Tensor | None) -> None:
        assert p.grad is not None
        if sq_norm is not None:
            sq_norm += torch.linalg.vector_norm(p.grad, dtype=torch.float32).square()
        step = spectral_step(p.grad).reshape(-1)
        for start, stop in self._spans(p):
            weight = self._decayed(p, start, stop, group)
            weight.add_(step[start:stop], alpha=-group["lr"])
            self._write(p, start, weight, group)

    def _decayed(self, p: Tensor, start: int, stop: int, group: dict[str, Any]) -> Tensor:
        """The weights ``start`` to ``stop`` after their decay, float32, (n,); of contiguous float32 the weights themselves."""
        return elements(local(p), start, stop).float().mul_(1 - group["lr"] * group["weight_decay"])

    def _write(self, p: Tensor, start: int, weight: Tensor, group: dict[str, Any]) -> None:
        """Put ``weight``, float32, (n,), where the weights begin at ``start``."""
        if p.dtype == torch.bfloat16:
            ((name, first),) = self._streams([p], group)
            bits = random_bits(name, first + start, first + start + len(weight), p.device)
            weight = round_stochastically(weight, bits.bitwise_and_(0xFFFF))
        if p.dtype != torch.float32 or not p.is_contiguous():
            put_elements(local(p), start, weight)

    def _update_together(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Update many small parameters at once, with fewer GPU kernels; signs to the bit as ``_update_stateless`` for each."""
        if is_on("factored", group):
            for some in stacks(parameters, self._most(parameters)):
                self._update_factored(some, group)
            return
        for some in bundles(parameters, self._most(parameters)):
            weights = [elements(local(p)) for p in some]
            self._update_bundle(group, some, weights)
            for p, weight in zip(some, weights, strict=True):
                if not p.is_contiguous():
                    put_elements(p, 0, weight)

    def _update_bundle(self, group: dict[str, Any], some: list[Tensor], weights: list[Tensor]) -> None:
        grads = [local(p.grad).reshape(-1) for p in some]  # type: ignore[arg-type]
        if some[0].dtype == torch.float32:
            denominators = torch._foreach_abs(grads)
            torch._foreach_add_(denominators, group["eps"])
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_addcdiv_(weights, grads, denominators, value=-group["lr"])
            return
        streams = zip(self._streams(some, group), weights, strict=True)
        noise = [(name, first, first + len(w)) for (name, first), w in streams]
        if self.compiled and some[0].dtype == torch.bfloat16:
            weight = torch.cat(weights)
            self._update_compiled_stateless(weight, torch.cat(grads), noise, group)
        else:
            weight, grad = torch.cat(weights).float(), torch.cat(grads).float()
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.addcdiv_(grad, grad.abs().add_(group["eps"]), value=-group["lr"])
            if some[0].dtype == torch.bfloat16:
                del grad  # a bundle less while the rest is rounded
                bits = random_bits_of(noise, weight.device)
                weight = round_stochastically(weight, bits.bitwise_and_(0xFFFF))
        torch._foreach_copy_(weights, list(torch.split(weight, [len(w) for w in weights])))

    def _update_compiled_stateless(
        self, weight: Tensor, grad: Tensor, streams: list[tuple[str, int, int]], group: dict[str, Any]
    ) -> None:
        numbers = [1 - group["lr"] * group["weight_decay"], group["eps"], -group["lr"]]
        update_stateless(weight, grad, spread_of(streams, weight.device), numbers)

    def _streams(self, parameters: list[Tensor], group: dict[str, Any]) -> list[tuple[str, int]]:
        """The stream of noise for each parameter, and where in it the parameter begins."""
        step = f"weight {self.seed} {group['num_steps']}"
        return [(f"{step} {self._places[whole_of(p)][1]}", first_element(p)) for p in parameters]

    def _most(self, parameters: list[Tensor]) -> int:
        """Elements to work on at a time."""
        on_cpu = bool(parameters) and parameters[0].device.type == "cpu"
        return min(self.block_elements, CPU_ELEMENTS) if on_cpu else self.block_elements

    def _spans(self, p: Tensor) -> list[Span]:
        """The elements of ``p`` in blocks of whole rows, each of which begins at a multiple of 256 elements."""
        width = _width(p)
        unit = width * (GROUP // math.gcd(width, GROUP))
        size = max(1, self._most([p]) // unit) * unit
        spans = [(start, min(start + size, p.numel())) for start in range(0, p.numel(), size)]
        return spans[:2] + spans[-1:] if p.is_meta and len(spans) > 3 else spans  # a forecast: they all hold the same

    def _gradient(self, p: Tensor, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the gradient, float32; of a float32 ``p.grad`` a view, not to be written to."""
        dense = None if p.grad is None else local(p.grad).reshape(-1, _width(p))[start:stop].float()
        if p not in self.row_gradients:
            assert dense is not None
            return dense
        rows = self.row_gradients.block(p, start, stop)
        return rows if dense is None else rows.add_(dense)

    def _gradients(self, some: list[Tensor], start: int, stop: int) -> Tensor:
        """The same of parameters that are alike, (N, stop - start, width)."""
        gradients = [self._gradient(p, start, stop) for p in some]
        return gradients[0][None] if len(some) == 1 else torch.stack(gradients)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The same as in ``torch.optim.Optimizer``. Row gradients are dropped too."""
        super().zero_grad(set_to_none)
        self.row_gradients.clear()

    def state_dict(self) -> dict[str, Any]:
        """The same as in ``torch.optim.Optimizer``. It waits for copies of moments to the host."""
        if self.moments.on_host and torch.cuda.is_available():
            torch.cuda.synchronize()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The same as in ``torch.optim.Optimizer``, but moments keep their type and go where this optimizer holds them.

        Raises: UserError if they were saved with other ``state_bits``.
        """
        # torch would cast the moments to the type of the weights, and move all of them to the device
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, p in zip(numbers, parameters, strict=True):
            if number not in state_dict["state"]:
                continue
            self.place_state(p, state_dict["state"][number])

    def place_state(self, p: Tensor, saved: dict[str, Any]) -> None:
        """Copy the saved state of ``p`` to where this optimizer holds it.

        Raises: UserError if it was saved with other ``state_bits``.
        """
        if is_factored(saved):
            p, state = owner_of(p), factored_state(p)
            self._fill(state, saved)
            self.state[p] = state
            return
        if saved["exp_avg"].dtype != self.moments.dtypes()["exp_avg"]:
            raise UserError(
                f"the saved moments are {saved['exp_avg'].dtype}, but state_bits is {self.moments.bits}: give the "
                "optimizer the state_bits with which they were saved"
            )
        state = {"step": torch.zeros(())} | self.moments.zeros(local(p))
        self._fill(state, saved)
        self.state[p] = state

    @staticmethod
    def _fill(state: dict[str, Tensor], saved: dict[str, Any]) -> None:
        for name, entry in state.items():
            if local(saved[name]).shape != entry.shape:
                raise UserError(
                    f"the saved {name} has the shape {tuple(saved[name].shape)} instead of {tuple(entry.shape)}: load the "
                    "state that was saved for this model"
                )
            entry.copy_(local(saved[name]))


def _at_once(group: dict[str, Any]) -> bool:
    """Whether parameters of a group can be updated together."""
    return is_on("factored", group) or (bool(group["stateless"]) and not is_on("spectral", group))


def is_on(name: str, group: dict[str, Any]) -> bool:
    """Whether a group is ``spectral`` or ``factored``; groups that were saved by earlier versions do not say."""
    return bool(group.get(name))


def _width(p: Tensor) -> int:
    """Elements of a row: the last dimension of a matrix or of several, one of a vector."""
    return max(1, p.shape[-1]) if p.ndim > 1 else 1
