"""LISA in TRL's ``GRPOTrainer``, with a reward function. Needs pip install 'lisatune[sft]'.

python examples/trl_grpo.py MODEL_FOLDER PROMPTS.jsonl    (rows of prompt)
"""

import sys
import tempfile

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from lisatune import LisaCallback


def vowels(completions: list[str], **_: object) -> list[float]:
    """The share of vowels in an answer: write your own function here."""
    return [sum(answer.count(v) for v in "aeiou") / max(1, len(answer)) for answer in completions]


def main(model_name: str, data_file: str, num_steps: int = 60) -> list[float]:
    rows = load_dataset("json", data_files=data_file, split="train").select_columns(["prompt"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            max_steps=num_steps,
            learning_rate=5e-4,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=24,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=False,
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model_name, dtype="float32"),
            reward_funcs=vowels,
            args=arguments,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(model_name),
            callbacks=[LisaCallback(num_active=2, interval_steps=5, seed=0)],
        )
        trainer.train()
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


if __name__ == "__main__":
    main(*sys.argv[1:3])
