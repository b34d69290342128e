"""Rates by part in the Trainer."""

import torch
from transformers import Trainer

from lisatune import LisaCallback, rates_by_part
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
