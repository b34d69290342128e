"""Frozen decoder layers in host memory, on the device in few bits or only while they are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lisatune.errors import UserError
from lisatune.levers.gradient_checkpointing import CheckpointedForward
from lisatune.memory.blocks import Cut, cut_of, whole_of
from lisatune.memory.few_bits import FewBits, Whole, few_bits
from lisatune.memory.offload import Shuttle, to_device, to_host


class HostLayers:
    """Parameters of decoder layers live in host memory while they are frozen, on ``device`` while they train.

    One rule for each parameter: what trains is used where it is; of what lies in host memory a copy is brought to the
    device for the time of its layer's forward, as in ``torch.func.functional_call(layer, copies, inputs)``. So layers that
    LISA trains run plainly, frozen ones are streamed, and of LoRA's layers the adapters stay. Results are equal to the
    bit. The ``Parameter`` objects stay the same, only their ``data`` moves: optimizers and engines keep holding them, and
    ``state_dict`` and ``save_pretrained`` find the right values wherever they are.

    All layers must be checkpointed first (``checkpoint_layers``), because autograd would keep every copy until the backward
    pass. This goes inside of the checkpoint: what is run again fetches again, and its copies die with the backward pass
    of their layer.

    Constructing it moves all parameters of the layers to host memory, the trained ones too; ``place`` is to be called
    then, and whenever ``requires_grad`` has changed. Without gradients (an evaluation) a model runs wherever they lie.
    Embedding, head and norm are not touched, and buffers belong on the device: see ``rest_to_device``. The device of the
    model, which transformers reads from its first parameter, is therefore still that of the embedding.

    With ``bits``, training computes frozen matrices from copies in 8 or 4 bits, which are made anew at each switch. What
    trains is exact, and so is what lies in host memory: no update is ever rounded to few bits. An evaluation
    (``model.eval()``) is one of the exact weights.

    Of a matrix that is trained in slices, the trained rows are on the device, exact, and all of it is in host memory. The
    rows take their place in each copy of the matrix. ``write_back`` is to be called after each step then.

    Args:
        decoder: The decoder layers, the lowest first.
        device: Where the model computes.
        bits: Bits of a frozen matrix while training, 8 or 4; None for the exact one.
        stream: Keep nothing of frozen layers on the device. False, which needs ``bits``: their copies in few bits stay
            there, and so do all vectors.
        dtype: Floating type that the parameters get on their way; None for their own.
    Attributes:
        device: The device that was given.
    Raises: UserError if a layer is not checkpointed, or is streamed already; and in the forward pass, if a parameter
        trains that lies in host memory.
    Cost: of frozen layers at most two are on the device at once, that which is computed and the next one, which is copied
        meanwhile (above it in the forward pass, below it in the backward pass); on a CPU one. Each differentiated layer
        crosses twice a step, the others once. On CUDA the host's copies are pinned.
    Example:
        >>> from lisatune.levers.gradient_checkpointing import checkpoint_layers
        >>> decoder = [nn.Linear(4, 4) for _ in range(3)]
        >>> checkpoint_layers(decoder)
        >>> host_layers = HostLayers(decoder, torch.device("cpu"))
        >>> for number, layer in enumerate(decoder):
        ...     _ = layer.requires_grad_(number == 1)
        >>> host_layers.place()
        >>> host_layers.host_bytes()  # two layers of 4 * 4 + 4 float32
        160
    """

    def __init__(
        self, decoder: Sequence[nn.Module], device: torch.device, *, bits: int | None = None, stream: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        checkpoints: list[CheckpointedForward] = []
        for layer in decoder:
            forward = layer.forward
            if not isinstance(forward, CheckpointedForward):
                raise UserError(
                    "frozen layers can be streamed only if all decoder layers are checkpointed: call "
                    "checkpoint_layers(decoder) first"
                )
            if isinstance(forward.inner, _StreamedForward):
                raise UserError("the decoder layers are streamed already: make one HostLayers for a model")
            checkpoints.append(forward)
        self.device = device
        self._decoder = tuple(decoder)
        self._bits = bits
        self._stream = stream
        self._shuttle = Shuttle(device)
        self._in_host: set[nn.Parameter] = set()
        self._small: dict[nn.Parameter, FewBits] = {}
        for index, checkpointed in enumerate(checkpoints):
            checkpointed.inner = _StreamedForward(self, index, _Body(decoder[index], checkpointed.inner))
        movable = set(self._parameters())
        for parameter in (p for layer in decoder for p in layer.parameters()):
            parameter.data = _as_type(parameter.data, dtype)
            if parameter in movable:
                self._move(parameter, to_host_memory=True)
            else:
                parameter.data = parameter.data.to(device)
        self._settle()

    def place(self) -> None:
        """Move what trains to the device and what is frozen to host memory; for after each change of ``requires_grad``."""
        self._shuttle.drop()
        moved = [p for p in self._parameters() if p.requires_grad == (p in self._in_host)]
        for parameter in sorted(moved, key=lambda p: p.requires_grad):  # what leaves the device first, to make room
            self._move(parameter, to_host_memory=not parameter.requires_grad)
        if moved:
            self._settle()

    def write_back(self) -> None:
        """Put trained slices into host memory and into the copies in few bits; for after each optimizer step."""
        cuts = {p: cut for p in self._in_host if (cut := cut_of(p)) is not None}
        if cuts:
            self._shuttle.drop()
        for parameter, cut in cuts.items():
            cut.write_back()
            self._shrink_slices(parameter, cut)
        if cuts:
            self._settle()

    def renew(self) -> None:
        """Make the copies in few bits anew, for after the weights in host memory got other values."""
        self._shuttle.drop()
        for parameter in self._small:
            self._shrink(parameter)
        self._settle()

    def remove(self, device: torch.device) -> None:
        """Undo it: all parameters move to ``device``, and layers run as before (adapters can then be merged)."""
        self._shuttle.drop()
        for layer in self._decoder:
            assert isinstance(layer.forward, CheckpointedForward)
            assert isinstance(layer.forward.inner, _StreamedForward)
            layer.forward.inner = layer.forward.inner.body.inner
        self._in_host.clear()
        self._small.clear()
        for parameter in self._parameters():
            parameter.data = parameter.data.to(device)
            parameter.streamed_to = None  # type: ignore[attr-defined]
        self._settle()

    def host_bytes(self) -> int:
        """Bytes of the parameters that lie in host memory."""
        return sum(p.numel() * p.element_size() for p in self._in_host)

    def copies(self) -> list[Tensor]:
        """Codes and scales of the frozen matrices."""
        return [tensor for small in self._small.values() for tensor in small.tensors]

    def _parameters(self) -> list[nn.Parameter]:
        """Those that move between the device and host memory; slices stay on the device."""
        every = {id(p): p for layer in self._decoder for p in layer.parameters()}.values()
        return [p for p in every if whole_of(p) is p and (self._stream or p.ndim > 1)]

    def _move(self, parameter: nn.Parameter, *, to_host_memory: bool) -> None:
        parameter.streamed_to = self.device if to_host_memory else None  # type: ignore[attr-defined]
        if not to_host_memory:
            parameter.data = to_device(parameter.data, self.device)
            self._in_host.discard(parameter)
            self._small.pop(parameter, None)
            return
        self._shrink(parameter)
        unpinned = self.device.type == "cuda" and parameter.device.type == "cpu"
        parameter.data = parameter.data.pin_memory() if unpinned else to_host(parameter.data)
        self._in_host.add(parameter)

    def _shrink(self, parameter: nn.Parameter) -> None:
        """Hold ``parameter`` in few bits besides, if it is a matrix and that was asked for."""
        if self._bits is None or parameter.ndim < 2:
            return
        small = few_bits(parameter.data.to(self.device), self._bits)
        if self._stream:
            codes, scales = small.tensors
            small = replace(small, tensors=(to_host(codes), to_host(scales)))
        self._small[parameter] = small

    def _shrink_slices(self, parameter: nn.Parameter, cut: Cut) -> None:
        """Make the codes of trained rows anew, if ``parameter`` is held in few bits."""
        small = self._small.get(parameter)
        if small is None:
            return
        for slot, rows in zip(cut.slots, cut.ranges, strict=True):
            start, stop = small.apart(*rows)
            alone = (start, stop) == rows
            exact = slot if alone else to_device(parameter.detach().view(cut.shape)[start:stop], self.device)
            small.rewrite(start, exact)

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # whoever reads the host's values from now on finds them there

    def _run(self, index: int, body: _Body, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        streamed = self._streamed(index)
        stored = self._stored(index, streamed)
        tensors = [tensor for one in stored for tensor in one.tensors]
        if self._stream or not self._decoder[index].training:
            tensors = self._shuttle.fetch(tensors)
            following = self._following(index, args)
            if following is not None:
                after = self._stored(following, self._streamed(following))
                self._shuttle.prefetch([tensor for one in after for tensor in one.tensors])
        parts = iter(tensors)
        copies = [one.restore([next(parts) for _ in one.tensors]) for one in stored]
        cuts = [cut_of(p) for p in streamed.values()]
        copies = [copy if cut is None else cut.in_copy(copy) for copy, cut in zip(copies, cuts, strict=True)]
        return torch.func.functional_call(body, dict(zip(streamed, copies, strict=True)), args, kwargs)

    def _stored(self, index: int, streamed: dict[str, nn.Parameter]) -> list[FewBits | Whole]:
        """What the parameters ``streamed`` of layer ``index`` are computed from."""
        small = self._small if self._decoder[index].training else {}
        return [small.get(p) or Whole((p,)) for p in streamed.values()]

    def _following(self, index: int, args: tuple[Any, ...]) -> int | None:
        """The layer that runs after layer ``index``, if there is one."""
        if torch._C._current_graph_task_id() == -1:  # no backward pass is under way
            return index + 1 if index + 1 < len(self._decoder) else None
        differentiated = isinstance(args[0], Tensor) and args[0].requires_grad  # else the backward pass ends here
        return index - 1 if index > 0 and differentiated else None

    def _streamed(self, index: int) -> dict[str, nn.Parameter]:
        """Parameters of layer ``index`` in host memory, by their names in ``_Body``."""
        streamed = {f"layer.{n}": p for n, p in self._decoder[index].named_parameters() if p in self._in_host}
        trained = [name for name, p in streamed.items() if p.requires_grad]
        if trained and torch.is_grad_enabled():
            raise UserError(
                f"{trained[0].removeprefix('layer.')} of decoder layer {index} trains, but is in host memory: call "
                "HostLayers.place() whenever requires_grad has changed"
            )
        return streamed


class _StreamedForward:
    """What a checkpoint runs in place of the layer's own forward."""

    def __init__(self, host_layers: HostLayers, index: int, body: _Body) -> None:
        self.host_layers = host_layers
        self.index = index
        self.body = body

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.host_layers._run(self.index, self.body, args, kwargs)


class _Body(nn.Module):
    """A layer's own forward as a module, for ``functional_call`` would call the layer with its hooks and its checkpoint."""

    def __init__(self, layer: nn.Module, inner: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = layer
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def _as_type(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def rest_to_device(
    model: nn.Module, decoder: Sequence[nn.Module], device: torch.device, dtype: torch.dtype | None = None
) -> None:
    """Move to ``device`` what ``HostLayers`` does not: all buffers, and the parameters outside the decoder layers.

    In place of ``model.to(device)``, for a model that was loaded on the CPU and is too large for the device.

    Example:
        >>> model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4))
        >>> device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        >>> rest_to_device(model, [model[1]], device)
        >>> model[0].weight.device.type == device.type, model[1].weight.device.type
        (True, 'cpu')
    """
    inside = {id(p) for layer in decoder for p in layer.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in inside:
            parameter.data = _as_type(parameter.data, dtype).to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
