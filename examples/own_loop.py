"""LISA in a loop of one's own: the lines that LISA adds to plain PyTorch are marked.

python examples/own_loop.py MODEL_FOLDER TEXT_FILE
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lisatune import LisaEngine, UniformSampler, find_layers


def main(model_name: str, text_file: str, num_steps: int = 60) -> list[float]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).train()
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, fused=True)  # over all parameters, before any is frozen

    layers = find_layers(model)  # LISA
    sampler = UniformSampler(len(layers.decoder), num_active=2, seed=0)  # LISA: gamma
    engine = LisaEngine(layers, sampler, interval_steps=5)  # LISA: K
    print(layers.describe())

    ids = torch.tensor(tokenizer(Path(text_file).read_text(encoding="utf-8"))["input_ids"])
    rows = ids[: len(ids) // 64 * 64].view(-1, 64)
    losses = []
    for step in range(num_steps):
        engine.begin_step(step, optimizer)  # LISA: freeze, unfreeze, drop optimizer state
        batch = rows[torch.randint(len(rows), (4,), generator=torch.Generator().manual_seed(step))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step:3d}  loss {losses[-1]:.4f}  layers {engine.active}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:3])
