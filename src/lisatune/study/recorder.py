"""How far each part of a model moves in training: a JSON line every so many steps, for the study of layers.

Shapes: a weight or its change is (out, in); LoRA's factors are up, B of the paper, (out, r), and down, A, (r, in).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import torch
from torch import Tensor, nn

from lisatune.common.files import write_whole
from lisatune.errors import UserError
from lisatune.layers import Layers
from lisatune.study.matrix_rank import (
    change_singular_values,
    effective_rank,
    product_norm,
    product_singular_values,
    stable_rank,
)
from lisatune.study.start_weights import StartWeights, blocks_of

NORMS = "norms.jsonl"


class NormRecorder:
    """Appends to ``norms.jsonl`` how large each part's weights are, and how far they are from those of step 0.

    One line is ``{"step": 40, "parts": {"embedding": {...}, "layers.0": {...}, ...}}``, and of a part it holds

    ==================  ============================================================================================
    ``norm``            L2 norm of all that trains in the part, taken together: of a LoRA run the adapters A and B
    ``mean_norm``       mean of ``norm`` over the lines so far, without step 0: with a line a step, the paper's w(l)
    ``change``          L2 norm of W - W_0: of a LoRA run, of scale * (B A - B_0 A_0)
    ``updates``         number of steps in which it trained
    ``a_norm, b_norm``  of a LoRA run: L2 norms of its A and its B
    ``adapter_change``  of a LoRA run: L2 norm of (A, B) - (A_0, B_0), the paper's quantity with step 0 taken away
    ``base_norm``       in line 0: L2 norm of the weights that ``change`` changes, which LoRA leaves frozen
    ``num_weights``     in line 0: how many these are
    ``rank``            where asked for: mean effective rank of its matrices' changes, of those that moved; 0 if none has
    ``stable_rank``     the same of the stable rank
    ``matrices``        each matrix that moved: its ``change``, ``rank``, ``stable_rank``, and ``of``, the most its rank
                        could be
    ==================  ============================================================================================

    What is not finite is left out. No weight, gradient or random state is touched: a run that records is the run that
    does not, to the bit.

    Weights of step 0 are read again from the model's safetensors, a block at a time, where these hold the very weights
    that the model has now (tried tensor by tensor); of all others, a GGUF file's or adapters', a copy is kept in host memory:
    ``host_bytes``. So there is no second model in memory in the common case, and at most one on the host.

    Args:
        layers: The model's parts, before the first step: at W_0, and with every parameter that will ever train asking
            for a gradient. Of a run that is resumed too.
        folder: Of the run.
        source: Folder or hub name that the model was loaded from.
    Attributes:
        updates: Part to steps in which it trained.
        host_bytes: Of the copies.
    Cost: making it reads the model once. A line reads what trained since the line before, and its W_0, once; with LoRA
        it costs r * r * (out + in) multiplications a module in place of the product's r * out * in. Beside
        the weights it holds 32 MiB at most, between steps, when neither gradients nor activations are there, so that
        peaks stay what they were but for models smaller than that. Ranks cost what ``change_singular_values`` says.
    Raises: UserError for adapters whose change is more than scale * B * A (DoRA, stacked experts).
    Reference: Pan et al., LISA, arXiv:2403.17919, its motivation.
    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lisatune import find_layers
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32,
        ...                                      num_hidden_layers=3, num_attention_heads=2))
        >>> folder = Path(tempfile.mkdtemp())
        >>> with NormRecorder(find_layers(model), folder) as recorder:
        ...     recorder.begin()
        ...     _ = model.lm_head.weight.data.add_(0.5)  # 64 * 16 weights
        ...     recorder.count({"head"})
        ...     recorder.record(1)
        >>> line = json.loads((folder / "norms.jsonl").read_text().splitlines()[1])
        >>> {part: round(of["change"], 3) for part, of in line["parts"].items()}
        {'embedding': 0.0, 'layers.0': 0.0, 'layers.1': 0.0, 'layers.2': 0.0, 'norm': 0.0, 'head': 16.0}
    """

    def __init__(self, layers: Layers, folder: Path, *, source: str | Path | None = None) -> None:
        self._path = folder / NORMS
        self._parts = _parts_of(layers)
        self._start = StartWeights(layers.model, source)
        for part in self._parts.values():
            for name, parameter in part.trained().items():
                self._start.add(name, parameter, in_file=name in part.plain)
        self.host_bytes = self._start.host_bytes
        self.updates = dict.fromkeys(self._parts, 0)
        self._sums = dict.fromkeys(self._parts, 0.0)
        self._counts = dict.fromkeys(self._parts, 0)
        self._known: dict[str, dict[str, float]] = {}  # what was measured, of parts that have not trained since
        self._file: TextIO | None = None

    def begin(self, num_steps: int = 0, updates: Mapping[str, int] | None = None) -> None:
        """Open the file where ``num_steps`` steps have led; lines of later ones, which are taken again, are dropped.

        Args:
            num_steps: Steps that are done; with 0, step 0 is recorded.
            updates: ``updates`` as it was then. Default: that of the last line that stays, which has to be of this step.
        Raises: UserError if neither tells how often each part has trained.
        """
        kept = _lines_until(self._path, num_steps)
        if self._path.exists():
            write_whole(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        for line in kept:
            self._add_to_means(line["parts"], line["step"])
        if updates is None and num_steps:
            if not kept or kept[-1]["step"] != num_steps:
                raise UserError(
                    f"{self._path} does not tell how often each layer had trained at step {num_steps}: go on without "
                    "norm_steps, or choose another output"
                )
            updates = {part: of["updates"] for part, of in kept[-1]["parts"].items()}
        self.updates |= {part: number for part, number in (updates or {}).items() if part in self.updates}
        self._file = self._path.open("a", encoding="utf-8")
        if num_steps == 0:
            self.record(0)

    def count(self, trained_parts: Iterable[str]) -> None:
        """Take note of one step's update of ``trained_parts``; once a step, whether it is recorded or not."""
        for part in trained_parts:
            if part in self.updates:
                self.updates[part] += 1
                self._known.pop(part, None)

    @torch.no_grad()
    def record(self, step: int, *, ranks: bool = False) -> None:
        """Append the line of ``step`` (steps done); ``ranks`` decomposes the change of every matrix, which is dear."""
        assert self._file is not None, "begin() comes first"
        line: dict[str, dict[str, Any]] = {}
        for name, part in self._parts.items():
            if name not in self._known:
                self._known[name] = self._measure(part)
            line[name] = dict(self._known[name])
            if step == 0:
                line[name] |= {"base_norm": part.base_norm(), "num_weights": part.num_weights()}
            if ranks and part.has_matrices():
                line[name] |= self._ranks(part, self._known[name]["change"])
            line[name] = {key: value for key, value in line[name].items() if _is_finite(value)}
        self._add_to_means(line, step)
        for name, of in line.items():
            if self._counts[name]:
                of["mean_norm"] = self._sums[name] / self._counts[name]
            of["updates"] = self.updates[name]
        self._file.write(json.dumps({"step": step, "parts": line}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until all lines are on the disk; a checkpoint relies on them."""
        assert self._file is not None
        os.fsync(self._file.fileno())

    def describe(self) -> str:
        """Where the weights of step 0 are, in one line."""
        return (
            f"norms of {len(self._parts)} parts: weights of step 0 are read again from the model's files"
            f" ({self._start.num_in_files:,} tensors) or copied in host memory ({self.host_bytes / 2**20:,.1f} MiB)"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def _add_to_means(self, parts: Mapping[str, Mapping[str, Any]], step: int) -> None:
        """In the order of the file and from what it holds, so that a resumed run adds up to the same bits."""
        for name, of in parts.items():
            if step and "norm" in of and name in self._sums:
                self._sums[name] += of["norm"]
                self._counts[name] += 1

    def _measure(self, part: _Part) -> dict[str, float]:
        norms, changes = [], []
        for name, parameter in part.plain.items():
            norm, change = self._norm_and_change(name, parameter)
            norms.append(norm)
            changes.append(change)
        if not part.adapters:
            return {"norm": math.hypot(*norms), "change": math.hypot(*changes)}
        of_factor: dict[str, list[float]] = {"down": [], "up": []}
        moved = list(changes)
        for adapter in part.adapters:
            for factor, (name, parameter) in adapter.factors().items():
                norm, change = self._norm_and_change(name, parameter)
                of_factor[factor].append(norm)
                moved.append(change)
            changes.append(abs(adapter.scale) * product_norm(*self._factors_of_change(adapter)))
        return {
            "norm": math.hypot(*norms, *of_factor["down"], *of_factor["up"]), "change": math.hypot(*changes),
            "a_norm": math.hypot(*of_factor["down"]), "b_norm": math.hypot(*of_factor["up"]),
            "adapter_change": math.hypot(*moved),
        }  # fmt: skip

    def _norm_and_change(self, name: str, parameter: Tensor) -> tuple[float, float]:
        squares = torch.zeros(2, dtype=torch.float64, device=parameter.device)
        for index in blocks_of(parameter.shape):
            now = parameter[index].float()
            then = self._start.block(name, index, parameter)
            norms = torch.stack([torch.linalg.vector_norm(now), torch.linalg.vector_norm(now.sub(then))])
            squares += norms.double().square()
        norm, change = squares.sqrt().tolist()
        return norm, change

    def _factors_of_change(self, adapter: _Adapter) -> tuple[Tensor, Tensor]:
        """up and down of B A - B_0 A_0: twice as many of them, [B, -B_0] and [A; A_0], unless B_0 A_0 is 0, as peft begins."""
        if adapter.begins_at_zero:
            return adapter.up, adapter.down
        (down_name, down), (up_name, up) = adapter.factors().values()
        return (
            torch.cat([up.float(), -self._start.whole(up_name, up)], dim=1),
            torch.cat([down.float(), self._start.whole(down_name, down)], dim=0),
        )

    def _ranks(self, part: _Part, change: float) -> dict[str, Any]:
        """Of the matrices that moved; of weights that are not finite there is nothing to tell."""
        matrices: dict[str, dict[str, float]] = {}
        moved = change > 0 and math.isfinite(change)
        for name, values in self._singular_values(part) if moved else ():
            change = values.square().sum().sqrt().item()
            if change > 0:
                matrices[name] = {
                    "change": change, "rank": effective_rank(values), "stable_rank": stable_rank(values),
                    "of": float(len(values)),
                }  # fmt: skip
        mean = {key: _mean([of[key] for of in matrices.values()]) for key in ("rank", "stable_rank")}
        return {**mean, "matrices": matrices}

    def _singular_values(self, part: _Part) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in part.plain.items():
            if parameter.ndim >= 2:
                yield name, self._change_singular_values(name, parameter)
        for adapter in part.adapters:
            yield adapter.name, abs(adapter.scale) * product_singular_values(*self._factors_of_change(adapter))

    def _change_singular_values(self, name: str, parameter: Tensor) -> Tensor:
        def changes(*, by_columns: bool) -> Iterator[Tensor]:
            for index in blocks_of(parameter.shape, by_columns=by_columns):
                change = parameter[index].double() - self._start.block(name, index, parameter).double()
                yield change.reshape(-1, change.shape[-1])

        rows, columns = parameter.numel() // parameter.shape[-1], parameter.shape[-1]
        wide = rows < columns and parameter.ndim == 2
        return change_singular_values(
            (change.mT for change in changes(by_columns=True)) if wide else changes(by_columns=False)
        )


@dataclass
class _Adapter:
    """LoRA's two factors of one module."""

    name: str
    down_name: str
    down: nn.Parameter
    up_name: str
    up: nn.Parameter
    scale: float
    base: Tensor
    begins_at_zero: bool

    def factors(self) -> dict[str, tuple[str, nn.Parameter]]:
        return {"down": (self.down_name, self.down), "up": (self.up_name, self.up)}


@dataclass
class _Part:
    """Of one part: what trains by itself, adapters, and the weights that a change is to be compared with."""

    plain: dict[str, nn.Parameter]
    adapters: list[_Adapter] = field(default_factory=list)
    base: dict[int, Tensor] = field(default_factory=dict)

    def trained(self) -> dict[str, nn.Parameter]:
        return self.plain | dict(item for adapter in self.adapters for item in adapter.factors().values())

    def has_matrices(self) -> bool:
        return bool(self.adapters) or any(p.ndim >= 2 for p in self.plain.values())

    def base_norm(self) -> float:
        norms = []
        for weight in self.base.values():
            blocks = [torch.linalg.vector_norm(weight[i], dtype=torch.float32) for i in blocks_of(weight.shape)]
            norms += torch.stack(blocks).tolist() if blocks else []
        return math.hypot(*norms)

    def num_weights(self) -> int:
        return sum(weight.numel() for weight in self.base.values())


def _parts_of(layers: Layers) -> dict[str, _Part]:
    """The parts in which something asks for a gradient."""
    adapters = list(_adapters_of(layers.model))
    own = {id(parameter) for adapter in adapters for _, parameter in adapter.factors().values()}
    parts = {}
    for name, parameters in layers.parts().items():
        ids = {id(p) for p in parameters.values()}
        plain = {n: p for n, p in parameters.items() if p.requires_grad and id(p) not in own}
        inside = [adapter for adapter in adapters if id(adapter.down) in ids]
        if plain or inside:
            # a tied head owns no weight, but its adapter changes one
            weights = [p for p in parameters.values() if id(p) not in own] + [adapter.base for adapter in inside]
            parts[name] = _Part(plain, inside, {id(w): w.detach() for w in weights if w.is_floating_point()})
    return parts


def _adapters_of(model: nn.Module) -> Iterator[_Adapter]:
    """All LoRA adapters that train, by what peft's modules hold, so that peft need not be installed."""
    for name, module in model.named_modules():
        for kind in ("lora_A", "lora_embedding_A"):
            for adapter in getattr(module, kind, {}):
                found = _adapter_of(module, name, kind, adapter)
                if found.down.requires_grad or found.up.requires_grad:
                    yield found


def _adapter_of(module: Any, name: str, kind: str, adapter: str) -> _Adapter:
    kinds = (kind, kind.replace("_A", "_B"))
    holders = [getattr(module, each)[adapter] for each in kinds]
    end = "" if isinstance(holders[0], nn.Parameter) else ".weight"  # an embedding's factors are bare
    down, up = (holder if isinstance(holder, nn.Parameter) else holder.weight for holder in holders)
    base = module.get_base_layer().weight
    # the weights of a Conv1D and of an embedding lie across; quantized ones have no shape to compare
    fits = {tuple(base.shape), tuple(base.shape)[::-1]} & {(up.shape[0], down.shape[1])} or not base.is_floating_point()
    if not fits or len(module.lora_magnitude_vector):
        raise UserError(
            f"norm_steps: the adapter of {name} changes its weight by more than scale * B * A, whose norm is not known: "
            "leave norm_steps out"
        )
    names = [f"{name}.{each}.{adapter}{end}" for each in kinds]
    return _Adapter(name, names[0], down, names[1], up, module.scaling[adapter], base, product_norm(up, down) == 0)


def _lines_until(path: Path, num_steps: int) -> list[dict[str, Any]]:
    """Lines of the steps up to ``num_steps``; of none, not of step 0 either, if no step is done. Half a line is left out."""
    if not path.exists():
        return []
    lines = map(read_line, path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [line for line in lines if num_steps and line is not None and line["step"] <= num_steps]


def read_line(text: str) -> dict[str, Any] | None:
    """A line of ``norms.jsonl``; None if it is none, or half of one.

    Example:
        >>> read_line('{"step": 1, "parts": {"head": {"norm": 2.0, "change": 0.5, "updates": 1}}}')["step"]
        1
        >>> read_line('{"step": 1, "parts": {"head": {"norm": "two"}}}')
    """
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(line, dict) and _is_number(line.get("step")) and isinstance(line.get("parts"), dict)):
        return None
    whole = isinstance(line["step"], int) and line["step"] >= 0
    for of in line["parts"].values():
        whole = whole and isinstance(of, dict) and isinstance(of.get("updates"), int)
        whole = whole and all(_is_number(value) for key, value in of.items() if key != "matrices")
    return line if whole else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
