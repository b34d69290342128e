"""LISA in TRL's ``RewardTrainer``: the score head trains in every step. Needs pip install 'lisatune[sft]'.

python examples/trl_reward.py MODEL_FOLDER PAIRS.jsonl    (rows of prompt, chosen and rejected)
"""

import sys
import tempfile

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from lisatune import LisaCallback


def main(model_name: str, data_file: str, num_steps: int = 60) -> list[float]:
    rows = load_dataset("json", data_files=data_file, split="train")
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForSequenceClassification.from_pretrained(model_name, num_labels=1, dtype="float32")
    model.config.pad_token_id = tokenizer.pad_token_id
    with tempfile.TemporaryDirectory() as folder:
        arguments = RewardConfig(
            output_dir=folder,
            max_steps=num_steps,
            learning_rate=5e-4,
            per_device_train_batch_size=4,
            max_length=128,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=False,
        )
        trainer = RewardTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[LisaCallback(num_active=2, interval_steps=5, seed=0)],
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main(*sys.argv[1:3])
