"""How far each part of a model moves in training: a JSON line every so many steps, for the study of layers.

Shapes: a weight or its change is (out, in); LoRA's factors are up, B of the paper, (out, r), and down, A, (r, in).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from lisatune.errors import UserError
from lisatune.layers import Layers
from lisatune.study.distances import Distances
from lisatune.study.norms_file import NormsFile
from lisatune.study.trained_parts import trained_parts_of


class NormRecorder:
    """Appends to ``norms.jsonl`` how large each part's weights are, and how far they are from those of step 0.

    One line is ``{"step": 40, "parts": {"embedding": {...}, "layers.0": {...}, ...}}``, and for each part it holds

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
        folder: Folder of the run.
        source: Folder or hub name that the model was loaded from.
    Attributes:
        updates: Part to steps in which it trained.
        host_bytes: Bytes of the copies in host memory.
    Cost: making it reads the model once. A line reads what trained since the line before, and its W_0, once; with LoRA
        it costs r * r * (out + in) multiplications a module in place of the product's r * out * in. Beside
        the weights it holds 32 MiB at most, between steps, when neither gradients nor activations are there, so that
        peaks stay what they were but for models smaller than that. Ranks cost what ``change_singular_values`` says.
    Raises: UserError for adapters whose change is more than scale * B * A (DoRA, stacked experts).
    Reference: Pan et al., LISA, arXiv:2403.17919, its motivation.
    Example:
        >>> import json, tempfile
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
        >>> {part: round(values["change"], 3) for part, values in line["parts"].items()}
        {'embedding': 0.0, 'layers.0': 0.0, 'layers.1': 0.0, 'layers.2': 0.0, 'norm': 0.0, 'head': 16.0}
    """

    def __init__(self, layers: Layers, folder: Path, *, source: str | Path | None = None) -> None:
        self._parts = trained_parts_of(layers)
        self._distances = Distances(layers.model, self._parts.values(), source)
        self._file = NormsFile(folder)
        self.updates = dict.fromkeys(self._parts, 0)
        self._sums = dict.fromkeys(self._parts, 0.0)
        self._counts = dict.fromkeys(self._parts, 0)
        self._known: dict[str, dict[str, float]] = {}  # what was measured, of parts that have not trained since

    @property
    def host_bytes(self) -> int:
        """Bytes of the copies in host memory."""
        return self._distances.start.host_bytes

    def begin(self, num_steps: int = 0, updates: Mapping[str, int] | None = None) -> None:
        """Open the file where ``num_steps`` steps have led; lines of later ones, which are taken again, are dropped.

        Args:
            num_steps: Steps that are done; with 0, step 0 is recorded.
            updates: ``updates`` as it was then. Default: that of the last line that stays, which has to be of this step.
        Raises: UserError if neither tells how often each part has trained.
        """
        kept = self._file.go_back(num_steps)
        for line in kept:
            self._add_to_means(line["parts"], line["step"])
        if updates is None and num_steps:
            if not kept or kept[-1]["step"] != num_steps:
                raise UserError(
                    f"{self._file.path} does not say how often each layer had trained at step {num_steps}: resume without "
                    "norm_steps, or choose another output"
                )
            updates = {part: values["updates"] for part, values in kept[-1]["parts"].items()}
        self.updates |= {part: number for part, number in (updates or {}).items() if part in self.updates}
        self._file.open()
        if num_steps == 0:
            self.record(0)

    def count(self, trained_parts: Iterable[str]) -> None:
        """Take note of one step's update of ``trained_parts``; once a step, whether it is recorded or not."""
        for part in trained_parts:
            if part in self.updates:
                self.updates[part] += 1
                self._known.pop(part, None)

    @torch.no_grad()
    def record(self, step: int, *, matrix_ranks: bool = False) -> None:
        """Append the line of ``step`` (steps done); ``matrix_ranks`` decomposes the change of every matrix, which takes long."""
        parts: dict[str, dict[str, Any]] = {}
        for name, part in self._parts.items():
            if name not in self._known:
                self._known[name] = self._distances.measure(part)
            values: dict[str, Any] = dict(self._known[name])
            if step == 0:
                values |= {"base_norm": part.base_norm(), "num_weights": part.num_weights()}
            if matrix_ranks and part.has_matrices():
                values |= self._distances.ranks(part, self._known[name]["change"])
            parts[name] = {key: value for key, value in values.items() if _is_finite(value)}
        self._add_to_means(parts, step)
        for name, values in parts.items():
            if self._counts[name]:
                values["mean_norm"] = self._sums[name] / self._counts[name]
            values["updates"] = self.updates[name]
        self._file.write(step, parts)

    def sync(self) -> None:
        """Wait until all lines are on the disk; a checkpoint relies on them."""
        self._file.sync()

    def describe(self) -> str:
        """Where the weights of step 0 are, in one line."""
        return (
            f"norms of {len(self._parts)} parts: weights of step 0 are read again from the model's files"
            f" ({self._distances.start.num_in_files:,} tensors) or copied in host memory ({self.host_bytes / 2**20:,.1f} MiB)"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()

    def _add_to_means(self, parts: Mapping[str, Mapping[str, Any]], step: int) -> None:
        """Add what a line holds, in the order of the file, so that a resumed run has the same sums to the bit."""
        for name, values in parts.items():
            if step and "norm" in values and name in self._sums:
                self._sums[name] += values["norm"]
                self._counts[name] += 1


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
