import copy
import weakref
from itertools import combinations

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from lisatune import UserError, find_layers
from lisatune.levers import activation_offloading
from lisatune.levers.gradient_checkpointing import checkpoint_layers, is_checkpointed
from lisatune.memory import offload
from lisatune.memory.ledger import Ledger
from tiny import VOCABULARY, make_llama

ROWS, POSITIONS, WIDTH = 2, 8, 32
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def checkpoint(decoder, num_layers=None, *, offload=False):
    checkpoint_layers(decoder, num_layers)
    if offload:
        activation_offloading.offload_inputs(decoder)


def make_model(kind, **settings):
    """Four layers, width 32, dropout in the attention, and in GPT-2 everywhere."""
    if kind == "llama":
        return make_llama(attention_dropout=0.2, **settings).train()
    torch.manual_seed(0)
    if kind == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        return GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH, n_layer=4, n_head=4,
                       bos_token_id=1, eos_token_id=2, **settings)
        ).train()  # fmt: skip
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=4,
                    num_attention_heads=4, num_key_value_heads=2, attention_dropout=0.2, **settings)
    ).train()  # fmt: skip


def ids(seed=0):
    return torch.randint(3, VOCABULARY, (ROWS, POSITIONS), generator=torch.Generator().manual_seed(seed))


def draw(model, active, *, train_embedding=True):
    """As LisaEngine does: the layers ``active``, norm and head train, the embedding if asked for."""
    layers = find_layers(model)
    trained = layers.trained_parts(active, train_embedding=train_embedding, train_head=train_embedding)
    for part, parameters in layers.parts().items():
        for parameter in parameters.values():
            parameter.requires_grad_(part in trained)
            parameter.grad = None


def gradients(model):
    torch.manual_seed(1)  # of dropout
    loss = model(input_ids=ids(), labels=ids(), use_cache=False).loss  # a cache lays keys out in another way
    loss.backward()
    after = torch.rand(1)
    return {
        "loss": loss.detach(),
        "next random number": after,
        **{name: p.grad for name, p in model.named_parameters() if p.grad is not None},
    }


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("offload_inputs", [False, True], ids=["kept", "offloaded"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_gradients_are_those_of_no_checkpointing_to_the_bit_for_every_draw(kind, offload_inputs):
    plain = make_model(kind)
    checkpointed = []
    for num_layers in (None, 2):
        model = make_model(kind)
        checkpoint(find_layers(model).decoder, num_layers, offload=offload_inputs)
        checkpointed.append(model)
    for active in [(), *combinations(range(4), 1), (0, 2), (1, 3), (0, 1, 2, 3)]:
        for train_embedding in (False, True):
            draw(plain, active, train_embedding=train_embedding)
            expected = gradients(plain)
            for model in checkpointed:
                draw(model, active, train_embedding=train_embedding)
                assert_same(gradients(model), expected)


def test_dropout_acts_in_the_models_of_these_tests():
    for kind in ("llama", "gpt2", "qwen2"):
        model = make_model(kind)
        trained = model(input_ids=ids(), labels=ids()).loss
        assert trained != model.eval()(input_ids=ids(), labels=ids()).loss


def count_calls(decoder):
    """Runs of each layer's own forward, counted inside of the checkpoint."""
    calls = [0] * len(decoder)

    def counted(number, forward):
        def run(*args, **kwargs):
            calls[number] += 1
            return forward(*args, **kwargs)

        return run

    for number, layer in enumerate(decoder):
        layer.forward.inner = counted(number, layer.forward.inner)
    return calls


@pytest.mark.parametrize("offload_inputs", [False, True])
def test_below_the_lowest_active_layer_nothing_is_differentiated_or_made_again(offload_inputs):
    """Counted: gradients that pass through a layer, and how often each layer runs."""
    model = make_llama().train()
    decoder = find_layers(model).decoder
    checkpoint(decoder, offload=offload_inputs)
    calls, passed = count_calls(decoder), []

    def watch(number):
        def hook(_module, _args, out):
            if out.requires_grad:
                out.register_hook(lambda _grad: passed.append(number))

        return hook

    for number, layer in enumerate(decoder):
        layer.register_forward_hook(watch(number))
    for active in [(0,), (2,), (3,), (1, 3)]:
        for train_embedding in (False, True):
            draw(model, active, train_embedding=train_embedding)
            calls[:], passed[:] = [0] * 4, []
            gradients(model)
            lowest = 0 if train_embedding else active[0]
            assert calls == [1 if number < lowest else 2 for number in range(4)]
            assert sorted(passed) == list(range(lowest, 4))


def test_only_the_lowest_layers_are_checkpointed():
    model = make_llama().train()
    decoder = find_layers(model).decoder
    checkpoint_layers(decoder, 3)
    assert [is_checkpointed(layer) for layer in decoder] == [True, True, True, False]
    checkpoint_layers(find_layers(make_llama()).decoder, 0)


def held_after_forward(**options):
    """Bytes that wait for the backward pass, on the device and in host memory, by the ledger on meta."""
    with torch.device("meta"):
        model = make_llama().train()
    if options.pop("checkpointing"):
        checkpoint(find_layers(model).decoder, **options)
    with Ledger(granularity=1) as ledger:
        tokens = torch.zeros(ROWS, POSITIONS, dtype=torch.int64, device="meta")
        positions = torch.arange(POSITIONS, device="meta")[None]
        out = model(input_ids=tokens, position_ids=positions).logits
        held = ledger.total_bytes, ledger.host_bytes
        out.sum().backward()
    return held


def test_offloading_moves_one_input_for_each_layer_and_nothing_else():
    """On meta, which holds the input sent last until the next is sent, as CUDA does: the top layer's."""
    plain, _ = held_after_forward(checkpointing=False)
    kept, none = held_after_forward(checkpointing=True)
    offloaded, host = held_after_forward(checkpointing=True, offload=True)
    one = ROWS * POSITIONS * WIDTH * 4
    assert kept < plain - 4 * 8 * one  # a layer keeps more than eight tensors of its width
    assert none == 0
    assert host == 4 * one
    assert kept - offloaded == 3 * one


def test_inputs_of_layers_that_are_not_differentiated_are_not_offloaded(monkeypatch):
    sent, to_host = [], offload.to_host
    monkeypatch.setattr(offload, "to_host", lambda t: sent.append(t.shape) or to_host(t))
    model = make_llama().train()
    checkpoint(find_layers(model).decoder, offload=True)
    draw(model, (2,), train_embedding=False)
    gradients(model)
    assert sent == [(ROWS, POSITIONS, WIDTH)] * 2


def test_at_most_two_offloaded_inputs_are_back_on_the_device(monkeypatch):
    """Counted on meta, where the next lower input is fetched early, as on CUDA."""
    storages, most = [], [0]

    def counted(tensor, device):
        out = offload_to_device(tensor, device)
        storages.append(weakref.ref(out.untyped_storage()))
        most[0] = max(most[0], sum(s() is not None for s in storages))
        return out

    offload_to_device = offload.to_device
    monkeypatch.setattr(offload, "to_device", counted)
    held_after_forward(checkpointing=True, offload=True)
    assert len(storages) == 4
    assert most[0] == 2
    assert not any(s() is not None for s in storages)


def test_offloaded_inputs_serve_a_second_backward_pass():
    model = make_llama().train()
    checkpoint(find_layers(model).decoder, offload=True)
    loss = model(input_ids=ids(), labels=ids()).loss
    loss.backward(retain_graph=True)
    first = {name: p.grad.clone() for name, p in model.named_parameters()}
    loss.backward()
    assert all(torch.equal(p.grad, 2 * first[name]) for name, p in model.named_parameters())


def test_two_forward_passes_before_their_backward_passes():
    plain, model = make_llama().train(), make_llama().train()
    checkpoint(find_layers(model).decoder, offload=True)
    for m in (plain, model):
        losses = [m(input_ids=ids(seed), labels=ids(seed)).loss for seed in (1, 2)]
        for loss in losses:
            loss.backward()
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


@pytest.mark.parametrize("offload_inputs", [False, True])
def test_lora_adapters_get_their_gradients_though_no_input_asks_for_one(offload_inputs):
    from peft import LoraConfig, get_peft_model

    def make(checkpointing):
        model = make_llama()
        settings = LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.2, target_modules="all-linear")
        torch.manual_seed(0)
        model = get_peft_model(model, settings).train()
        for name, parameter in model.named_parameters():  # else the gradients of all A are zero at first
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        if checkpointing:
            checkpoint(find_layers(model).decoder, offload=offload_inputs)
        return model

    expected = gradients(make(False))
    assert len(expected) == 2 + 4 * 7 * 2
    assert all(g.any() for g in expected.values())
    assert_same(gradients(make(True)), expected)


def test_without_training_or_gradients_the_layers_run_plainly():
    model = make_llama()
    expected = model.eval()(input_ids=ids()).logits
    decoder = find_layers(model).decoder
    checkpoint_layers(decoder)
    calls = count_calls(decoder)
    assert torch.equal(model(input_ids=ids()).logits, expected)
    with torch.no_grad():
        model.train()(input_ids=ids())
    assert calls == [2, 2, 2, 2]
    out = model.eval().generate(ids(), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (ROWS, POSITIONS + 3)
    assert calls == [5, 5, 5, 5]
    cache = DynamicCache(config=model.config)
    for _ in range(2):  # with gradients enabled, but not training
        model(input_ids=ids(), past_key_values=cache)
    assert cache.get_seq_length() == 2 * POSITIONS


def test_a_cache_is_taken_away_wherever_it_comes():
    class Layer(nn.Linear):
        def forward(self, hidden, cache, *, past_key_values, use_cache):
            assert cache is None
            assert past_key_values is None
            assert use_cache is False
            return super().forward(hidden)

    layer = Layer(4, 4)
    checkpoint_layers([layer])
    layer(torch.ones(1, 4), DynamicCache(), past_key_values=DynamicCache(), use_cache=True).sum().backward()


def test_a_deep_copy_has_layers_of_its_own():
    model = make_llama().train()
    checkpoint(find_layers(model).decoder, offload=True)
    gradients(model)
    model.zero_grad()
    other = copy.deepcopy(model)
    gradients(other)
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in other.parameters())


def test_refusals():
    model = make_llama().train()
    decoder = find_layers(model).decoder
    with pytest.raises(UserError, match="num_layers is 5: choose from 0 to 4"):
        checkpoint_layers(decoder, 5)
    model.gradient_checkpointing_enable()
    with pytest.raises(UserError, match="call model.gradient_checkpointing_disable"):
        checkpoint_layers(decoder)
    model.gradient_checkpointing_disable()
    checkpoint_layers(decoder, 2)
    with pytest.raises(UserError, match="call checkpoint_layers once"):
        checkpoint_layers(decoder)
    with pytest.raises(UserError, match="LlamaDecoderLayer is not given its input as the first positional argument"):
        decoder[0](hidden_states=torch.zeros(1, 1, WIDTH))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids(), past_key_values=cache)
    with pytest.raises(UserError, match="a filled key-value cache cannot be used"):
        model(input_ids=ids(), past_key_values=cache)


@needs_cuda
@pytest.mark.parametrize("offload_inputs", [False, True])
def test_cuda_gradients_are_the_same(offload_inputs):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        plain, model = make_llama(layers=8).cuda().train(), make_llama(layers=8).cuda().train()
        checkpoint(find_layers(model).decoder, offload=offload_inputs)
        tokens = ids().cuda()
        for active in [(0,), (4,), (7,), (2, 5)]:
            for m in (plain, model):
                draw(m, active, train_embedding=False)
                m(input_ids=tokens, labels=tokens).loss.backward()
            for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
                assert (a.grad is None) == (b.grad is None), name
                assert a.grad is None or torch.equal(a.grad, b.grad), name
    finally:
        torch.use_deterministic_algorithms(False)


@needs_cuda
def test_cuda_each_lever_lowers_the_peak():
    def peak(checkpointing, offload_inputs=False):
        model = (
            make_llama(layers=16, hidden_size=256, intermediate_size=512, max_position_embeddings=2048).cuda().train()
        )
        draw(model, (0,))
        if checkpointing:
            checkpoint(find_layers(model).decoder, offload=offload_inputs)
        tokens = torch.randint(3, VOCABULARY, (4, 2048), device="cuda")
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model.model(input_ids=tokens).last_hidden_state.float().mean().backward()
            model.zero_grad()
        return torch.cuda.max_memory_allocated() - before

    plain, kept, offloaded = peak(False), peak(True), peak(True, True)
    one = 4 * 2048 * 256 * 4
    assert kept < plain / 2
    assert kept - offloaded > 10 * one  # of 16 inputs; at most three are on the device at once
