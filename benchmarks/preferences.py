"""What DPO and a reward model hold in the Trainer: weights, reference, gradients, optimizer state; LISA beside LoRA and full.

python benchmarks/preferences.py MODEL_FOLDER

Four steps each, on rows made here. Bytes are counted, not estimated: of every tensor that the model, the reference model, the
gradients before a step and the optimizer after it hold.
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from results import write_page
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from lisatune import LisaCallback
from lisatune.common.amounts import gib
from lisatune.memory.measure import state_bytes, tensor_bytes

PAIRS = Dataset.from_list(
    [{"prompt": f"What is {i}?", "chosen": f" It is {i}.", "rejected": " No no no."} for i in range(16)]
)
METHODS = ("LISA", "LoRA r16", "full")


class Watch(TrainerCallback):  # type: ignore[misc]
    """The most bytes of gradients and of optimizer state."""

    def __init__(self) -> None:
        self.gradients = self.state = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        held = tensor_bytes(p.grad for p in model.parameters() if p.grad is not None)
        self.gradients = max(self.gradients, held)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.state = max(self.state, state_bytes(optimizer))


def held(folder: str, task: str, method: str, **more: Any) -> list[int]:
    """Bytes of weights, reference, gradients and optimizer state."""
    watch, tokenizer = Watch(), AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    options: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 2, "max_length": 64, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False,
    }  # fmt: skip
    extra: dict[str, Any] = {"callbacks": [watch, *([LisaCallback(2, 2)] if method == "LISA" else [])]}
    if method == "LoRA r16":
        extra["peft_config"] = LoraConfig(
            r=16, target_modules="all-linear", task_type="CAUSAL_LM" if task == "DPO" else "SEQ_CLS"
        )
    with tempfile.TemporaryDirectory() as output:
        if task == "DPO":
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            config: Any = DPOConfig(output_dir=output, **options, **more)
            trainer: Any = DPOTrainer(
                model=model, args=config, train_dataset=PAIRS, processing_class=tokenizer, **extra
            )
        else:
            model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
            model.config.pad_token_id = tokenizer.pad_token_id
            config = RewardConfig(output_dir=output, **options)
            trainer = RewardTrainer(model=model, args=config, train_dataset=PAIRS, processing_class=tokenizer, **extra)
        trainer.train()
    reference = getattr(trainer, "ref_model", None)
    weights = tensor_bytes(trainer.model.parameters())
    return [weights, tensor_bytes(reference.parameters()) if reference is not None else 0, watch.gradients, watch.state]


def main(folder: str) -> None:
    lines = [
        "| | weights | reference | gradients | optimizer state | together |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    cases: list[tuple[str, str, dict[str, Any]]] = [("DPO", method, {}) for method in METHODS]
    cases += [("DPO", method, {"precompute_ref_log_probs": True}) for method in ("LISA", "full")]
    cases += [("reward model", method, {}) for method in METHODS]
    for task, method, more in cases:
        sizes = held(folder, task, method, **more)
        name = f"{task}, {method}" + (", reference computed first" if more else "")
        lines.append(f"| {name} | {' | '.join(gib(size) if size else '-' for size in [*sizes, sum(sizes)])} |")
        print(lines[-1], flush=True)
    print(write_page("preferences", "\n".join(lines), __doc__ or ""))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    main(*sys.argv[1:2])
