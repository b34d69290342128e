"""LISA in ``transformers.Trainer``: one callback.

python examples/hf_trainer.py MODEL_FOLDER TEXT_FILE
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from lisatune import LisaCallback


def main(model_name: str, text_file: str, num_steps: int = 60) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(model_name)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    ids = tokenizer(Path(text_file).read_text(encoding="utf-8"))["input_ids"]
    rows = [{"input_ids": row, "labels": row} for row in (ids[i : i + 64] for i in range(0, len(ids) - 63, 64))]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=num_steps,
            learning_rate=5e-4,
            per_device_train_batch_size=4,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
        )
        lisa = LisaCallback(num_active=2, interval_steps=5, seed=0)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[lisa])
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main(*sys.argv[1:3])
