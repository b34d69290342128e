"""LoRA's adapters, from peft."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisatune.common.files import replace_folder
from lisatune.errors import UserError, missing_package
from lisatune.layers import Layers, find_layers
from lisatune.methods.base import Method
from lisatune.processes.collectives import rank

if TYPE_CHECKING:
    from lisatune.learner import Learner


@dataclass(kw_only=True)
class Lora(Method):
    """Trains adapters, and freezes the model. The arguments are settings."""

    lora_r: int
    lora_alpha: float
    lora_dropout: float
    lora_target_modules: str | list[str]
    lora_use_rslora: bool
    lora_use_dora: bool
    save_merged: bool
    model: str
    task: str = "sft"

    def usual_learning_rate(self, layers: Layers) -> float:
        """What many tools have; adapters want more than weights."""
        return 2e-4

    def prepare(self, model: Any) -> tuple[Any, Layers]:
        """Add the adapters. A head that gets one is another module afterwards."""
        _, layers = super().prepare(model)  # refuses a model without decoder layers before peft sees it
        wrapped = add_adapters(
            model, r=self.lora_r, alpha=self.lora_alpha, dropout=self.lora_dropout, targets=self.lora_target_modules,
            use_rslora=self.lora_use_rslora, use_dora=self.lora_use_dora, task_type=task_type(self.task),
        )  # fmt: skip
        return wrapped, find_layers(layers.model, self.decoder_name)

    def finish(self, learner: Learner, folder: Path) -> Any:
        """Save the adapters in ``adapter``. Returns the model with them merged in, or None without ``save_merged``."""
        model, new = learner.model, folder / ".adapter.new"
        model.peft_config["default"].base_model_name_or_path = self.model
        adapter = learner.placement.adapter(model)
        if rank() == 0:
            shutil.rmtree(new, ignore_errors=True)  # left by a run that was killed here
            model.save_pretrained(new, state_dict=adapter)
            replace_folder(new, folder / "adapter")
        if not self.save_merged:
            return None
        learner.placement.gather(model)
        return model.merge_and_unload()


def task_type(task: str) -> str:
    """Peft's name of what the model of a task does."""
    return "SEQ_CLS" if task == "reward" else "CAUSAL_LM"


def lora_config(
    *, r: int, alpha: float, dropout: float, targets: str | list[str], use_rslora: bool, use_dora: bool,
    task_type: str = "CAUSAL_LM",
) -> Any:  # fmt: skip
    """Peft's config of the adapters; arguments as those of ``add_adapters``, and peft's name of what the model does.

    Raises: MissingPackageError without peft.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise missing_package("peft", "method=lora", "lora") from error
    return LoraConfig(
        task_type=task_type, r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, use_rslora=use_rslora,
        use_dora=use_dora,
    )  # fmt: skip


def add_adapters(
    model: Any,
    *,
    r: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    targets: str | list[str] = "all-linear",
    use_rslora: bool = False,
    use_dora: bool = False,
    task_type: str = "CAUSAL_LM",
) -> Any:
    """``model`` with LoRA's adapters in the type of its weights, everything else frozen; needs peft.

    Args:
        model: A causal language model; peft changes it in place and wraps it.
        r: Rank of the adapters.
        alpha: Their scale, times 1/r; with ``use_rslora`` times 1/sqrt(r) (arXiv:2312.03732).
        dropout: Before the adapters.
        targets: Modules that get adapters, as peft names them.
        use_rslora: See ``alpha``.
        use_dora: Learn the magnitude of each output beside its direction (arXiv:2402.09353).
        task_type: Peft's name of what the model does; a score head trains whole.
    Raises: UserError if no module fits ``targets``; MissingPackageError without peft.
    """
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise missing_package("peft", "method=lora", "lora") from error
    adapters = lora_config(
        r=r,
        alpha=alpha,
        dropout=dropout,
        targets=targets,
        use_rslora=use_rslora,
        use_dora=use_dora,
        task_type=task_type,
    )
    first = next(model.parameters())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a name of its past
            # a model on meta gets its adapters on meta: those of 70B would fill the memory otherwise
            wrapped = get_peft_model(model, adapters, autocast_adapter_dtype=False, low_cpu_mem_usage=first.is_meta)
    except ValueError as error:
        raise UserError(f"lora_target_modules={targets}: {error}") from error
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(first.dtype)  # peft leaves them float32 on the meta device
    return wrapped
