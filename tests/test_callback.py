"""``LisaCallback`` in the Trainers, and all three doors beside each other."""

import pytest
import torch

from lisatune import LisaCallback, LisaEngine, UniformSampler, UserError, find_layers
from tiny import make_llama

pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
from transformers import Trainer, TrainerCallback

from trainers import ROWS, StopAfter, arguments

SETTINGS = {"num_active": 2, "interval_steps": 2, "seed": 7}


class Watch(TrainerCallback):
    """Notes what trains in each micro-batch and each step."""

    def __init__(self):
        self.sets = []
        self.state_sizes = []

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self.sets.append((state.global_step, self.trained(model)))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.sets.append((state.global_step, self.trained(model)))

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.state_sizes.append(len(optimizer.state))

    @staticmethod
    def trained(model):
        return tuple(
            i for i, layer in enumerate(model.model.layers) if all(p.grad is not None for p in layer.parameters())
        )


def test_trainer_and_own_loop_give_the_same_weights_to_the_bit(tmp_path):
    in_trainer, own = make_llama(), make_llama()
    trainer = Trainer(
        model=in_trainer, args=arguments(tmp_path), train_dataset=ROWS, callbacks=[LisaCallback(**SETTINGS)]
    )
    groups = Trainer(model=own, args=arguments(tmp_path)).get_decay_parameter_names(own)
    trainer.train()

    named = list(own.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named if n in groups], "weight_decay": 0.1},
            {"params": [p for n, p in named if n not in groups], "weight_decay": 0.0},
        ],
        lr=1e-2,
        fused=True,
    )
    engine = LisaEngine(find_layers(own), UniformSampler(4, SETTINGS["num_active"], SETTINGS["seed"]), 2)
    own.train()
    for step in range(8):
        engine.begin_step(step, optimizer)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (8 - step) / 8
        ids = torch.tensor([row["input_ids"] for row in ROWS[2 * step : 2 * step + 2]])
        own(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(own.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for (name, a), b in zip(in_trainer.named_parameters(), own.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("sampler", "watched"), [("uniform", False), ("gradient_norm", True)])
def test_gradients_are_watched_for_a_sampler_that_learns_alone(tmp_path, monkeypatch, sampler, watched):
    """A Python call for each gradient is a price that a uniform draw need not pay."""
    hooked = []
    plain = torch.Tensor.register_post_accumulate_grad_hook

    def hook_of(p, hook):
        hooked.extend([] if p.is_meta else [p])  # the forecast's are there for a moment alone
        return plain(p, hook)

    monkeypatch.setattr(torch.Tensor, "register_post_accumulate_grad_hook", hook_of)
    lisa = LisaCallback(**SETTINGS, sampler=sampler)
    Trainer(model=make_llama(), args=arguments(tmp_path), train_dataset=ROWS, callbacks=[lisa]).train()
    assert bool(hooked) == watched


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_switch_never_falls_inside_an_accumulation_window(tmp_path, accumulation):
    watch, lisa = Watch(), LisaCallback(**SETTINGS)
    Trainer(
        model=make_llama(),
        args=arguments(tmp_path, gradient_accumulation_steps=accumulation, max_grad_norm=0),
        train_dataset=ROWS,
        callbacks=[lisa, watch],
    ).train()
    assert len(watch.sets) == 8 * accumulation
    for step, trained in watch.sets:
        assert trained == UniformSampler(4, 2, seed=7)(step // 2)
    assert len(set(watch.state_sizes)) == 1  # embedding, norm, head and two layers of nine tensors
    assert watch.state_sizes[0] == 3 + 2 * 9


def test_trainer_with_checkpointing_changes_no_bit(tmp_path):
    models = [make_llama(), make_llama()]
    for model, checkpointing in zip(models, (False, True), strict=True):
        Trainer(
            model=model,
            args=arguments(tmp_path, gradient_checkpointing=checkpointing),
            train_dataset=ROWS,
            callbacks=[LisaCallback(**SETTINGS)],
        ).train()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="num_active is 0"):
        LisaCallback(num_active=0)
    with pytest.raises(UserError, match="interval_steps is 0"):
        LisaCallback(interval_steps=0)
    trainer = Trainer(
        model=make_llama(), args=arguments(tmp_path), train_dataset=ROWS, callbacks=[LisaCallback(num_active=5)]
    )
    with pytest.raises(UserError, match="has 4 decoder layers"):
        trainer.train()
    frozen = make_llama()
    frozen.model.layers[3].requires_grad_(False)
    trainer = Trainer(model=frozen, args=arguments(tmp_path), train_dataset=ROWS, callbacks=[LisaCallback()])
    with pytest.raises(UserError, match=r"does not hold model\.layers\.3"):
        trainer.train()


def test_adapters_are_refused(tmp_path):
    peft = pytest.importorskip("peft", reason="the extra 'lora' is not installed")
    model = peft.get_peft_model(make_llama(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=ROWS, callbacks=[LisaCallback()])
    with pytest.raises(UserError, match="this model has adapters"):
        trainer.train()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_the_embedding_frozen_the_backward_pass_ends_at_the_lowest_active_layer(tmp_path, checkpointing):
    """The Trainer's checkpointing makes the embedding's output ask for gradients; the callback takes that back."""
    model, passed = make_llama(), []

    def watch(number):
        def hook(_module, _args, out):
            if out.requires_grad:
                out.register_hook(lambda _grad: passed.append((trainer.state.global_step, number)))

        return hook

    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(watch(number))
    lisa = LisaCallback(num_active=1, interval_steps=1, train_embedding=False)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, gradient_checkpointing=checkpointing),
        train_dataset=ROWS,
        callbacks=[lisa],
    )
    trainer.train()
    for step in range(8):
        (lowest,) = UniformSampler(4, 1)(step)
        assert {number for at, number in passed if at == step} == set(range(lowest, 4))


def test_resumed_in_the_trainer_to_the_bit(tmp_path):
    """The Trainer keeps weights and moments; the step's number tells the layers, in the middle of an interval too."""

    def fit(model, folder, *callbacks, resume=None):
        lisa = LisaCallback(num_active=1, interval_steps=3)
        settings = arguments(folder, max_steps=12, save_strategy="steps", save_steps=5)
        trainer = Trainer(model=model, args=settings, train_dataset=ROWS, callbacks=[lisa, *callbacks])
        trainer.train(resume_from_checkpoint=resume)

    straight, stopped, resumed = make_llama(), make_llama(), make_llama(seed=1)
    fit(straight, tmp_path / "a")
    fit(stopped, tmp_path / "b", StopAfter(5))
    fit(resumed, tmp_path / "b", resume=str(tmp_path / "b" / "checkpoint-5"))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
