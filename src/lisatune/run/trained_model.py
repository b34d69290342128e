"""The trained model as a Hugging Face folder, adapters merged."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from lisatune.common.files import replace_folder
from lisatune.layers import find_layers
from lisatune.models.load import save_model, save_model_config
from lisatune.processes.collectives import barrier, rank
from lisatune.processes.shard_files import write_whole_files
from lisatune.processes.tensors import whole
from lisatune.run.build import Run


def save_trained(run: Run, folder: Path) -> None:
    """Write ``model`` into ``folder``, and ``adapter`` for LoRA; each is there whole or not at all."""
    if run.learner.sharded:
        _save_shards(run, folder)
        return
    model = run.learner.model
    if run.config.method == "lora":
        shutil.rmtree(folder / ".adapter.new", ignore_errors=True)  # of a run that was killed here
        model.save_pretrained(folder / ".adapter.new")
        replace_folder(folder / ".adapter.new", folder / "adapter")
        if run.learner.host_layers:
            model.to("cpu")  # adapters are merged where the weights are
            run.learner.host_layers.remove(torch.device("cpu"))
        model = model.merge_and_unload()
    model.requires_grad_(True)
    shutil.rmtree(folder / ".model.new", ignore_errors=True)
    save_model(model, run.tokenizer, folder / ".model.new")
    replace_folder(folder / ".model.new", folder / "model")


def _save_shards(run: Run, folder: Path) -> None:
    """Do what ``save_trained`` does where no process holds the whole model."""
    model = run.learner.model
    if run.config.method == "lora":
        adapter = {name: whole(p.detach()).cpu() for name, p in model.named_parameters() if "lora_" in name}
        if rank() == 0:
            shutil.rmtree(folder / ".adapter.new", ignore_errors=True)
            model.save_pretrained(folder / ".adapter.new", state_dict=adapter)
            replace_folder(folder / ".adapter.new", folder / "adapter")
        model = model.merge_and_unload()
    new = folder / ".model.new"
    if rank() == 0:
        shutil.rmtree(new, ignore_errors=True)
        save_model_config(model, run.tokenizer, new)
    barrier()
    parts = find_layers(model, run.config.decoder_name).parts()
    files = {part: {n: p.detach() for n, p in parameters.items()} for part, parameters in parts.items() if parameters}
    kept = model.state_dict().keys()
    if buffers := {name: buffer for name, buffer in model.named_buffers() if name in kept}:
        files["buffers"] = buffers
    write_whole_files(new, files)
    if rank() == 0:
        for file in new.glob("*.safetensors"):
            file.chmod(0o644)
        replace_folder(new, folder / "model")
