"""The trained model as a Hugging Face folder, adapters merged."""

from __future__ import annotations

import shutil
from pathlib import Path

from lisatune.common.files import replace_folder
from lisatune.models.load import stop_at
from lisatune.processes.collectives import rank
from lisatune.run.build import Run


def save_trained(run: Run, folder: Path) -> None:
    """Write ``model`` into ``folder``, and ``adapter`` for LoRA; each is there whole or not at all.

    With adapters alone, ``adapter`` has the tokenizer and the tokens that end an answer.
    """
    stop_at(run.learner.layers.model, run.data.ends())  # a stream's are known at the end alone
    learner, new = run.learner, folder / ".model.new"
    model = learner.method.finish(learner, folder)
    if model is None:
        if rank() == 0:
            run.tokenizer.save_pretrained(folder / "adapter")
            learner.model.generation_config.save_pretrained(folder / "adapter")
        return
    if rank() == 0:
        shutil.rmtree(new, ignore_errors=True)  # left by a run that was killed here
    learner.placement.save_model(model, run.tokenizer, new, run.config.decoder_name)
    if rank() == 0:
        replace_folder(new, folder / "model")
