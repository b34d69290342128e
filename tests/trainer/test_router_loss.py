"""The balancing loss of a mixture's routers is the same through all three doors: the command, the Trainer, a loop of one's own."""

import json
from array import array
from io import StringIO

import pytest
import torch
from rich.console import Console
from transformers import DbrxConfig, DbrxForCausalLM, JetMoeConfig, JetMoeForCausalLM, MixtralConfig, MixtralForCausalLM

from lisatune import LisaCallback, LisaEngine, UniformSampler, find_layers
from lisatune.data.formats import parse_row, read_rows
from lisatune.data.loader import collate
from lisatune.data.tokenize import Encoded, Encoder
from lisatune.loss import batch_loss
from lisatune.settings import build_config
from lisatune.train import train
from tiny import make_tokenizer

pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
from transformers import Trainer, TrainingArguments

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "output_router_logits": True,
}
MIXTURES = {
    "mixtral": lambda size: MixtralForCausalLM(
        MixtralConfig(vocab_size=size, num_attention_heads=2, num_key_value_heads=2, router_aux_loss_coef=0.5, **SIZES)
    ),
    # another name for the coefficient
    "jetmoe": lambda size: JetMoeForCausalLM(
        JetMoeConfig(vocab_size=size, num_key_value_heads=2, kv_channels=8, aux_loss_coef=0.5, **SIZES)
    ),
    # another name, in a config of its own; the model holds it
    "dbrx": lambda size: DbrxForCausalLM(
        DbrxConfig(vocab_size=size, d_model=32, n_heads=4, n_layers=2, output_router_logits=True, attn_config={"rope_theta": 1e4, "clip_qkv": 8},
                   ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "moe_loss_weight": 0.5})
    ),
}  # fmt: skip
STEPS, RATE = 3, 1e-2


@pytest.mark.parametrize("name", MIXTURES)
def test_three_doors_give_one_model(name, tmp_path):
    """Weights after three steps agree to a hundredth of a step; a gradient near Adam's epsilon makes much of rounding."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = MIXTURES[name](len(tokenizer))
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    texts = ["abcdefgh", "hgfedcba", "aabbccdd", "dcbaabcd"]  # of one length, so no door pads
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    options = {
        "method": "lisa", "sampled_unit": "layers", "num_active": 2, "max_steps": STEPS, "learning_rate": RATE, "device": "cpu",
        "per_device_train_batch_size": 4, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 1e9, "weight_decay": 0.0,
    }  # fmt: skip
    places = {"model": str(tmp_path / "m"), "data": str(tmp_path / "rows.jsonl"), "output": str(tmp_path / "run")}
    train(build_config(places | options), console=Console(file=StringIO()))
    by_command = type(model).from_pretrained(tmp_path / "run" / "model", dtype=torch.float32).state_dict()
    told = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in told if "loss" in line]

    examples = [parse_row(row) for row in read_rows(places["data"])]
    encoded = [list(document.ids) for document in Encoder(tokenizer, 100)(examples)]
    by_trainer = type(model).from_pretrained(tmp_path / "m", dtype=torch.float32)
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=STEPS, learning_rate=RATE, per_device_train_batch_size=4, lr_scheduler_type="constant",
        max_grad_norm=0, weight_decay=0.0, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(
        by_trainer, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in encoded],
        callbacks=[LisaCallback(num_active=2, interval_steps=20)],
    )  # fmt: skip
    trainer.train()
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]

    own = type(model).from_pretrained(tmp_path / "m", dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(own.parameters(), lr=RATE, weight_decay=0.0)
    engine = LisaEngine(find_layers(own), UniformSampler(2, num_active=2), interval_steps=20)
    ids = torch.tensor(encoded)
    for step in range(STEPS):
        engine.begin_step(step, optimizer)
        own(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    assert losses == pytest.approx(logged, rel=1e-3)  # the Trainer rounds what it logs
    for weight, value in by_command.items():
        for other in (by_trainer, own):
            torch.testing.assert_close(other.state_dict()[weight], value, atol=RATE / 100, rtol=0)


def test_accumulation_in_the_trainer_multiplies_the_router_loss_and_is_told(tmp_path, capsys):
    """The Trainer's own doing; ``lisatune train`` counts each micro-batch by its share."""
    losses = []
    for rows, accumulation in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        model = MIXTURES["mixtral"](64)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation,
            report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        ids = [list(range(3 + i, 11 + i)) for i in range(4)]
        trainer = Trainer(
            model,
            arguments,
            train_dataset=[{"input_ids": row, "labels": row} for row in ids],
            callbacks=[LisaCallback(1, 1)],
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        told = "adds the router loss once for each micro-batch, 2 times a step" in capsys.readouterr().out
        assert told == (accumulation == 2)
    assert losses[1] - losses[0] == pytest.approx(1.0, abs=0.05)  # 0.5 of a loss of about 2


def test_a_model_without_experts_trains_though_its_config_asks():
    """Doge is a mixture or not, by its config; its routers' logits are an empty tuple where it is none."""
    from transformers import DogeConfig, DogeForCausalLM

    model = DogeForCausalLM(
        DogeConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, output_router_logits=True, router_aux_loss_coef=0.5,
        )
    ).train()  # fmt: skip
    ids = list(range(5, 17))
    batch = collate([[Encoded(array("i", ids), array("i", ids))]], 0)
    expected = model(input_ids=batch.input_ids, labels=batch.input_ids).loss
    for linear_head in (True, False):
        loss = batch_loss(find_layers(model), batch, batch.num_labelled, linear_head=linear_head)
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
