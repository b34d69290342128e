"""Slices in ``transformers.Trainer``."""

import pytest
import torch

from lisatune import LisaCallback, UserError
from tiny import VOCABULARY, make_llama

pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
from transformers import Trainer, TrainingArguments


def rows():
    ids = torch.randint(3, VOCABULARY, (16, 8), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def fit(model, folder, callbacks, **more):
    settings = {"max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "save_strategy": "no"} | more
    arguments = TrainingArguments(
        output_dir=str(folder), **settings, use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=callbacks)
    trainer.train()
    return [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]


@pytest.mark.parametrize("more", [{}, {"bf16": True}, {"gradient_checkpointing": True, "max_grad_norm": 0.1}])
def test_one_slice_is_full_training_to_the_bit_clipping_included(tmp_path, more):
    full, sliced = make_llama(tied=True), make_llama(tied=True)
    norms = fit(full, tmp_path, [], **more)
    assert fit(sliced, tmp_path, [LisaCallback(sampled_unit="slices", num_slices=1, train_norms=True)], **more) == norms
    for (name, a), b in zip(full.named_parameters(), sliced.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_columns_train_with_an_optimizer_that_knows_strides_and_a_fused_one_is_refused(tmp_path):
    full, sliced = make_llama(tied=True), make_llama(tied=True)
    lisa = {"sampled_unit": "slices", "slices_of": "columns", "train_norms": True}
    norms = fit(full, tmp_path, [], optim="adamw_torch")
    assert fit(sliced, tmp_path, [LisaCallback(num_slices=1, **lisa)], optim="adamw_torch") == norms
    assert all(torch.equal(a, b) for a, b in zip(full.parameters(), sliced.parameters(), strict=True))
    with pytest.raises(
        UserError, match="fused AdamW may take the columns of a matrix for contiguous: use .* fused=False"
    ):
        fit(make_llama(), tmp_path, [LisaCallback(**lisa)], optim="adamw_torch_fused")


def test_every_tensor_has_its_turn(tmp_path, capsys):
    model, before = make_llama(), make_llama()
    fit(model, tmp_path, [LisaCallback(sampled_unit="slices", num_slices=4, train_norms="sampled")])
    assert "1 of 4 slices of each tensor train at a time, for 1 step (" in capsys.readouterr().out
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    assert all(changed)
    assert all(p.requires_grad for p in model.parameters())  # as it was before


def test_mistakes_are_refused():
    with pytest.raises(UserError, match="no effect without sampled_unit='slices'"):
        LisaCallback(num_slices=4)
    with pytest.raises(UserError, match="the model has 4 slices"):
        LisaCallback(num_active=5, num_slices=4, sampled_unit="slices").settings.engine(make_llama())
