"""The Trainer of transformers on a few rows; needs accelerate."""

import torch
from transformers import TrainerCallback, TrainingArguments

from tiny import VOCABULARY

ROWS = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(3, VOCABULARY, (24, 8), generator=torch.Generator().manual_seed(0)).tolist()
]


def arguments(folder, **more):
    return TrainingArguments(
        output_dir=str(folder),
        **(
            {
                "max_steps": 8,
                "learning_rate": 1e-2,
                "per_device_train_batch_size": 2,
                "weight_decay": 0.1,
                "save_strategy": "no",
            }
            | more
        ),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=100,
        train_sampling_strategy="sequential",
    )


class StopAfter(TrainerCallback):
    """Ends training once so many steps are done."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.steps
