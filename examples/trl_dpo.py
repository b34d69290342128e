"""LISA in TRL's ``DPOTrainer``. Needs pip install 'lisatune[sft]'.

python examples/trl_dpo.py MODEL_FOLDER PAIRS.jsonl    (rows of prompt, chosen and rejected)
"""

import sys
import tempfile

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from lisatune import LisaCallback


def main(model_name: str, data_file: str, num_steps: int = 60) -> list[float]:
    rows = load_dataset("json", data_files=data_file, split="train")
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=folder,
            max_steps=num_steps,
            learning_rate=5e-5,
            per_device_train_batch_size=4,
            max_length=128,
            precompute_ref_log_probs=True,  # by the model itself, before training: no second copy
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=False,
        )
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model_name, dtype="float32"),
            args=arguments,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(model_name),
            callbacks=[LisaCallback(num_active=2, interval_steps=5, seed=0)],
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main(*sys.argv[1:3])
