"""Rates by part in the Trainer."""

import pytest
import torch
from transformers import Trainer

import lisatune
from lisatune import LisaCallback, SliceEngine, SweepSampler, UserError, find_layers, rates_by_part
from tiny import make_llama
from trainers import ROWS, StopAfter, arguments


def make(folder, stop=None, **ratios):
    model = make_llama()
    optimizer = torch.optim.AdamW(rates_by_part(model, 1e-2, weight_decay=0.1, **ratios))
    callbacks = [LisaCallback(2, 3), *([StopAfter(stop)] if stop else [])]
    more = {"save_strategy": "steps", "save_steps": 4}
    return Trainer(
        model=model,
        args=arguments(folder, **more),
        train_dataset=ROWS,
        optimizers=(optimizer, None),
        callbacks=callbacks,
    )


def test_a_part_moves_at_its_own_rate_and_a_run_resumes_to_the_bit(tmp_path):
    before = {name: p.detach().clone() for name, p in make_llama().named_parameters()}
    straight = make(tmp_path / "straight", embedding_lr_ratio=1e-9, norm_lr_ratio=0.5)
    straight.train()
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in straight.model.named_parameters()}
    assert moved["model.embed_tokens.weight"] < 1e-9 < 1e-3 < moved["lm_head.weight"]
    assert [group["lr"] for group in straight.optimizer.param_groups] == [0.0] * 3  # at the end of the schedule
    make(tmp_path / "stopped", stop=4, embedding_lr_ratio=1e-9, norm_lr_ratio=0.5).train()
    resumed = make(tmp_path / "stopped", embedding_lr_ratio=1e-9, norm_lr_ratio=0.5)
    resumed.train(resume_from_checkpoint=True)
    weights = dict(resumed.model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in straight.model.named_parameters())


def test_spectral_steps_of_slices_in_a_trainer(tmp_path):
    """A slice moves by about the rate in all directions alike; the embedding, by its own rate at most."""
    model, before = make_llama(), make_llama()
    optimizer = lisatune.AdamW(rates_by_part(model, 1e-2, embedding_lr_ratio=0.3, spectral=True), weight_decay=0)
    callback = LisaCallback(sampled_unit="slices", num_slices=3)
    alike = arguments(tmp_path, max_steps=1, lr_scheduler_type="constant")
    Trainer(model=model, args=alike, train_dataset=ROWS, optimizers=(optimizer, None), callbacks=[callback]).train()
    old = dict(before.named_parameters())
    moved = {name: p.detach() - old[name].detach() for name, p in model.named_parameters()}
    slices = [change[change.any(1)] for name, change in moved.items() if "_proj" in name]
    assert len(slices) == 28
    for rows in slices:
        values = torch.linalg.svdvals(rows / 1e-2 / max(rows.shape) ** 0.5)
        assert values.max() < 1.5  # times how large the gradient is against its factors
        assert values.median() > 0.5  # a gradient of few tokens has few directions
    embedding = moved["model.embed_tokens.weight"].abs()
    torch.testing.assert_close(embedding.max(), torch.tensor(3e-3), rtol=1e-3, atol=0.0)


def test_a_spectral_group_is_refused_in_another_optimizer():
    model = make_llama()
    optimizer = torch.optim.AdamW(rates_by_part(model, 1e-2, spectral=True))
    engine = SliceEngine(find_layers(model), SweepSampler(3, 1))
    with pytest.raises(UserError, match="AdamW has no spectral step: use lisatune.AdamW"):
        engine.begin_step(0, optimizer)
