"""What DPO, KTO, GRPO and a reward model hold in the Trainer: weights, reference, gradients, optimizer state; LISA beside LoRA and full.

python benchmarks/preferences.py MODEL_FOLDER

Three steps each, on rows made here. Bytes are counted, not estimated: of every tensor that the model, the reference model, the
gradients before a step and the optimizer after it hold.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from dataclasses import dataclass
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from results import markdown, write_page
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from lisatune import LisaCallback
from lisatune.common.amounts import gib
from lisatune.memory.measure import state_bytes, tensor_bytes

PAIRS = [{"prompt": f"What is {i}?", "chosen": f" It is {i}.", "rejected": " No no no."} for i in range(16)]
LABELLED = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(PAIRS)]
PROMPTS = [{"prompt": row["prompt"]} for row in PAIRS]
METHODS = ("LISA", "LoRA r16", "full")
HEAD = ("", "weights", "reference", "gradients", "optimizer state", "together")


@dataclass(frozen=True)
class Case:
    """A trainer of TRL: its name there, its rows, and more of its arguments."""

    name: str
    trainer: str
    rows: list[dict[str, Any]]
    more: dict[str, Any]
    methods: tuple[str, ...] = METHODS


FIRST = {"precompute_ref_log_probs": True}
GRPO = {"num_generations": 2, "max_completion_length": 8}
CASES = (
    Case("DPO", "DPO", PAIRS, {}),
    Case("DPO, reference computed first", "DPO", PAIRS, FIRST, ("LISA", "full")),
    Case("KTO", "KTO", LABELLED, {}),
    Case("KTO, reference computed first", "KTO", LABELLED, FIRST, ("LISA", "full")),
    Case("GRPO, beta=0", "GRPO", PROMPTS, GRPO),
    Case("GRPO, beta=0.05", "GRPO", PROMPTS, GRPO | {"beta": 0.05}),
    Case("reward model", "Reward", PAIRS, {}),
)


class Watch(TrainerCallback):  # type: ignore[misc]
    """The most bytes of gradients and of optimizer state."""

    def __init__(self) -> None:
        self.gradients = self.state = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        held = tensor_bytes(p.grad for p in model.parameters() if p.grad is not None)
        self.gradients = max(self.gradients, held)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.state = max(self.state, state_bytes(optimizer))


def length_of(completions: list[str], **_: Any) -> list[float]:
    """A reward, for GRPO."""
    return [float(len(text)) for text in completions]


def held(folder: str, case: Case, method: str) -> list[int]:
    """Bytes of weights, reference, gradients and optimizer state."""
    watch, tokenizer, scores = Watch(), AutoTokenizer.from_pretrained(folder), case.trainer == "Reward"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    options: dict[str, Any] = {
        "max_steps": 3, "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False,
        "disable_tqdm": True, "gradient_checkpointing": False, "logging_steps": 100,
    }  # fmt: skip
    options |= case.more | ({} if case.trainer == "GRPO" else {"max_length": 64})
    extra: dict[str, Any] = {"callbacks": [watch, *([LisaCallback(2, 2)] if method == "LISA" else [])]}
    if method == "LoRA r16":
        kind = "SEQ_CLS" if scores else "CAUSAL_LM"
        extra["peft_config"] = LoraConfig(r=16, target_modules="all-linear", task_type=kind)
    if case.trainer == "GRPO":
        extra["reward_funcs"] = length_of
    if scores:
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
        model.config.pad_token_id = tokenizer.pad_token_id
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as output:
        arguments = getattr(trl, f"{case.trainer}Config")(output_dir=output, **options)
        trainer = getattr(trl, f"{case.trainer}Trainer")(
            model=model, args=arguments, train_dataset=Dataset.from_list(case.rows), processing_class=tokenizer, **extra
        )
        trainer.train()
    reference = getattr(trainer, "ref_model", None)
    weights = tensor_bytes(trainer.model.parameters())
    return [weights, tensor_bytes(reference.parameters()) if reference is not None else 0, watch.gradients, watch.state]


def main(folder: str) -> None:
    rows = []
    for case in CASES:
        for method in case.methods:
            sizes = held(folder, case, method)
            rows.append([f"{case.name}: {method}", *(gib(size) if size else "-" for size in [*sizes, sum(sizes)])])
            print(*rows[-1], flush=True)
    print(write_page("preferences", markdown(HEAD, rows), __doc__ or ""))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    main(*sys.argv[1:2])
