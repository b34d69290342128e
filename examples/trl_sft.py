"""LISA in TRL's ``SFTTrainer``: the same callback. Needs pip install 'lisatune[sft]'.

python examples/trl_sft.py MODEL_FOLDER DATA.jsonl    (rows of prompt and completion)
"""

import sys
import tempfile

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from lisatune import LisaCallback


def main(model_name: str, data_file: str, num_steps: int = 60) -> list[float]:
    rows = load_dataset("json", data_files=data_file, split="train")
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_steps=num_steps,
            learning_rate=5e-4,
            per_device_train_batch_size=4,
            max_length=128,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=False,
            model_init_kwargs={"dtype": "float32"},
        )
        lisa = LisaCallback(num_active=2, interval_steps=5, seed=0)
        trainer = SFTTrainer(model=model_name, args=arguments, train_dataset=rows, callbacks=[lisa])
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main(*sys.argv[1:3])
