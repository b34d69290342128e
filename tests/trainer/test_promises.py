"""What the callback keeps, gives back and refuses."""

import json

import pytest
import torch

from lisatune import LisaCallback, LisaEngine, UniformSampler, UserError, find_layers
from tiny import make_llama

pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
from transformers import Trainer

from trainers import ROWS, StopAfter, arguments

LISA = {"num_active": 1, "interval_steps": 3}


def fit(model, folder, *callbacks, resume=None, **more):
    trainer = Trainer(model=model, args=arguments(folder, **more), train_dataset=ROWS, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def step(model, ids, optimizers):
    model(input_ids=ids, labels=ids).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def test_after_training_everything_trains_again(tmp_path):
    model = make_llama()
    fit(model, tmp_path, LisaCallback(**LISA))
    assert all(p.requires_grad for p in model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    fit(model, tmp_path)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    fit(model, tmp_path, LisaCallback(**LISA))  # and LISA again


def test_a_checkpoint_keeps_the_settings_and_refuses_others(tmp_path):
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4}
    fit(make_llama(), tmp_path, LisaCallback(**LISA), StopAfter(4), **saving)
    checkpoint = tmp_path / "checkpoint-4"
    kept = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["LisaCallback"]
    assert kept["args"]["interval_steps"] == 3
    for other in ({"seed": 1}, {"interval_steps": 2}, {"state_policy": "keep"}, {"train_embedding": "sampled"}):
        name = next(iter(other))
        with pytest.raises(UserError, match=rf"made with {name}=.*, but LisaCallback has {name}={other[name]}"):
            fit(make_llama(), tmp_path, LisaCallback(**LISA | other), resume=str(checkpoint), **saving)
    fit(make_llama(), tmp_path, LisaCallback(**LISA), resume=str(checkpoint), **saving)


def test_a_checkpoint_made_without_lisa_is_no_obstacle(tmp_path):
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    fit(make_llama(), tmp_path, StopAfter(2), **saving)
    fit(make_llama(), tmp_path, LisaCallback(**LISA), resume=str(tmp_path / "checkpoint-2"), **saving)


def test_two_callbacks_are_refused(tmp_path):
    with pytest.raises(UserError, match="has 2 LisaCallbacks, which would undo each other"):
        fit(make_llama(), tmp_path, LisaCallback(**LISA), LisaCallback(**LISA))


@pytest.mark.parametrize("train_embedding", [False, "sampled"])
def test_reentrant_checkpoints_above_a_frozen_embedding_are_refused(tmp_path, train_embedding):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(UserError, match='set gradient_checkpointing_kwargs={"use_reentrant": False}'):
        fit(make_llama(), tmp_path, LisaCallback(**LISA, train_embedding=train_embedding), **options)


def test_reentrant_checkpoints_with_the_embedding_training_change_no_bit(tmp_path):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    plain, checkpointed = make_llama(), make_llama()
    fit(plain, tmp_path, LisaCallback(**LISA))
    fit(checkpointed, tmp_path, LisaCallback(**LISA), **options)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True))


def test_what_trains_is_printed(tmp_path, capsys):
    fit(make_llama(), tmp_path, LisaCallback(2, 5, train_embedding=False, train_head="sampled"), max_steps=1)
    told = capsys.readouterr().out
    assert "LISA: LlamaForCausalLM: 4 decoder layers at model.layers" in told
    assert (
        "2 of 5 layers train at a time, sampled by uniform every 5 steps (head with them); norm train in every step; "
        "embedding never" in told
    )


@pytest.mark.parametrize(
    ("make", "policy", "message"),
    [
        (torch.optim.LBFGS, "reset_layers", "LBFGS moves all parameters along one direction"),
        (torch.optim.RAdam, "reset_layers", "RAdam warms up again whenever state is dropped"),
        (torch.optim.RAdam, "keep", None),
        (torch.optim.NAdam, "reset_layers", None),
    ],
)
def test_optimizers_that_cannot_keep_the_promise_are_refused(llama, make, policy, message):
    engine, optimizer = LisaEngine(find_layers(llama), UniformSampler(4, 1), 2, policy), make(llama.parameters())
    if message is None:
        engine.begin_step(0, optimizer)
        return
    with pytest.raises(UserError, match=message):
        engine.begin_step(0, optimizer)


def test_schedule_free_optimizers_are_refused(llama):
    schedulefree = pytest.importorskip("schedulefree", reason="not installed")
    engine = LisaEngine(find_layers(llama), UniformSampler(4, 1), 2)
    with pytest.raises(UserError, match="AdamWScheduleFree counts steps for all parameters together"):
        engine.begin_step(0, schedulefree.AdamWScheduleFree(llama.parameters()))


def test_an_optimizer_swapped_in_is_checked(llama):
    engine = LisaEngine(find_layers(llama), UniformSampler(4, 1), 2)
    engine.begin_step(0, torch.optim.AdamW(llama.parameters()))
    engine.begin_step(1, torch.optim.AdamW(llama.parameters()))  # over all of them: nothing is wrong
    later = torch.optim.AdamW([p for p in llama.parameters() if p.requires_grad])
    with pytest.raises(UserError, match="does not hold model.layers"):
        engine.begin_step(1, later)


@pytest.mark.parametrize("policy", ["reset_layers", "reset_all", "keep"])
def test_muon_with_adamw_for_the_rest(llama, policy):
    hidden = [p for n, p in llama.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    ids = {id(p) for p in hidden}
    both = [torch.optim.Muon(hidden, lr=1e-2), torch.optim.AdamW([p for p in llama.parameters() if id(p) not in ids])]
    with pytest.raises(UserError, match=r"does not hold model\.embed_tokens.*all optimizers in a list"):
        LisaEngine(find_layers(llama), UniformSampler(4, 1), 2).begin_step(0, both[0])
    engine = LisaEngine(find_layers(llama), UniformSampler(4, 1), 2, policy)
    for number in range(8):
        engine.begin_step(number, both)
        before = {n: p.detach().clone() for n, p in llama.named_parameters()}
        step(llama, torch.randint(3, 128, (2, 8)), both)
        for part, own in engine.layers.parts().items():
            moved = any(not torch.equal(before[n], p) for n, p in own.items())
            assert moved == (bool(own) and part in engine.trained_parts(engine.drawn))
        held = [p for optimizer in both for p in optimizer.state]
        assert policy == "keep" or all(p.requires_grad for p in held)


def test_state_that_does_not_go_away_is_told(llama):
    """Two optimizers behind one face, whose ``state`` gives a view that drops nothing of the second."""
    from collections import ChainMap

    one = torch.optim.SGD([*llama.parameters()][:1], lr=0.1, momentum=0.9)
    two = torch.optim.SGD([*llama.parameters()][1:], lr=0.1, momentum=0.9)

    class Both:
        def __init__(self):
            self.param_groups = one.param_groups + two.param_groups
            self.state = ChainMap(one.state, two.state)

    both, engine = Both(), LisaEngine(find_layers(llama), UniformSampler(4, 1), 1)
    engine.begin_step(0, both)
    step(llama, torch.randint(3, 128, (2, 8)), [one, two])
    with pytest.raises(UserError, match="Both keeps optimizer state that cannot be dropped: give its optimizers as a"):
        engine.begin_step(1, both)


def test_bytes_are_told_before_and_after_and_a_page_is_written(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
    model = make_llama()
    lisa = LisaCallback(**LISA, report=True)
    fit(model, tmp_path, lisa, eval_strategy="no")
    told = capsys.readouterr().out
    # of 45,344 weights embedding, norm, head and one of four layers train: 17,504
    assert "LISA: weights 0.2 MiB, gradients 0.1 MiB at most, optimizer state 0.1 MiB (full training: 0.3 MiB)" in told
    assert "optimizer state 0.1 MiB at most" in told
    trained = sum(
        p.nbytes
        for part in ("embedding", "norm", "head", "layers.0")
        for p in find_layers(model).parts()[part].values()
    )
    counters = 4 * 12  # a step's number for each tensor
    assert lisa._record.most_state_bytes == 2 * trained + counters
    assert lisa._record._most_trained_bytes() == trained
    page = (tmp_path / "report.html").read_text()
    assert "Layers in training" in page
    assert "train_runtime" in page
