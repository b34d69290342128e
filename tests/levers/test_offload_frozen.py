import copy
import weakref

import pytest
import torch
from torch import nn

from lisatune import LisaEngine, UniformSampler, UserError, find_layers
from lisatune.levers import activation_offloading
from lisatune.levers.gradient_checkpointing import checkpoint_layers
from lisatune.levers.offload_frozen import HostLayers, rest_to_device
from lisatune.memory import offload
from lisatune.memory.ledger import Ledger
from lisatune.memory.measure import tensor_bytes
from tiny import VOCABULARY, make_llama

CPU, META = torch.device("cpu"), torch.device("meta")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2
        )
    )


def make_qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
                    num_attention_heads=4, num_key_value_heads=2, attention_dropout=0.2)
    )  # fmt: skip


def stream(model, device=CPU, *, offload_inputs=False):
    decoder = find_layers(model).decoder
    checkpoint_layers(decoder)
    if offload_inputs:
        activation_offloading.offload_inputs(decoder)
    return HostLayers(decoder, device)


def make_engine(model, num_active=1, **options):
    layers = find_layers(model)
    return LisaEngine(layers, UniformSampler(len(layers.decoder), num_active, seed=0), interval_steps=2, **options)


def make_adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def train(model, steps, *, engine=None, host_layers=None, optimizer=None, device=CPU, after_step=lambda step: None):
    """Two micro-batches a step; dropout's random numbers depend on the step alone."""
    model.train()
    optimizer = optimizer or make_adamw(model)
    for step in range(steps):
        if engine is not None and engine.begin_step(step, optimizer) and host_layers is not None:
            host_layers.place()
        torch.manual_seed(step)
        for _ in range(2):
            ids = torch.randint(3, VOCABULARY, (2, 8)).to(device)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step(step)


def assert_same_weights(ours, theirs):
    for (name, a), (other, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b), name


@pytest.mark.parametrize("train_embedding", [True, False])
@pytest.mark.parametrize("make", [make_llama, make_gpt2, make_qwen2])
def test_weights_are_those_of_the_plain_run_to_the_bit_over_13_switches(make, train_embedding):
    plain, model = make(), make()
    parameters = dict(model.named_parameters())
    host_layers = stream(model, offload_inputs=train_embedding)
    options = {"train_embedding": train_embedding, "train_head": train_embedding}
    train(plain, 26, engine=make_engine(plain, **options))
    placed = []

    def watch(step):
        moved = {name for name, p in parameters.items() if p in host_layers._in_host}
        assert moved == {n for n, p in parameters.items() if not p.requires_grad and (".layers." in n or ".h." in n)}
        placed.append(frozenset(moved))

    train(model, 26, engine=make_engine(model, **options), host_layers=host_layers, after_step=watch)
    assert_same_weights(model, plain)
    assert len(set(placed)) == 4  # each of four layers was drawn
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_evaluation_before_the_first_draw_and_after_it():
    plain, model = make_llama().eval(), make_llama().eval()
    ids = torch.arange(3, 11)[None]
    host_layers = stream(model)
    assert host_layers.host_bytes() == tensor_bytes(p for layer in model.model.layers for p in layer.parameters())
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
        model.requires_grad_(False)
        model.model.layers[1].requires_grad_(True)
        host_layers.place()
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def watch_copies(monkeypatch):
    """Live copies on the device, and the most bytes that they had together, looked at with each copy."""
    live, most = [], [0]

    def watched(tensor, device):
        out = to_device(tensor, device)
        live.append((weakref.ref(out.untyped_storage()), tensor.numel() * tensor.element_size()))
        live[:] = [(storage, size) for storage, size in live if storage() is not None]
        most[0] = max(most[0], sum(size for _, size in live))
        return out

    to_device = offload.to_device
    monkeypatch.setattr(offload, "to_device", watched)
    return live, most


@pytest.mark.parametrize("active", [(), (0,), (2,), (3,), (1, 2)])
@pytest.mark.parametrize("train_embedding", [False, True])
@pytest.mark.parametrize(("device", "num_layers"), [(CPU, 1), (META, 2)])
def test_few_frozen_layers_are_on_the_device_at_once(monkeypatch, device, num_layers, active, train_embedding):
    """On the CPU one; on meta, which fetches the next one early as CUDA does, two: in the forward and backward pass."""
    with device:
        model = make_llama(layers=5).train()
    model.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(train_embedding)
    model.model.norm.requires_grad_(True)
    for number in active:
        model.model.layers[number].requires_grad_(True)
    host_layers = stream(model, device)
    host_layers.place()
    live, most = watch_copies(monkeypatch)
    one_layer = tensor_bytes(model.model.layers[0].parameters())
    tokens = torch.zeros(1, 8, dtype=torch.int64, device=device)
    positions = torch.arange(8, device=device)[None]
    loss = model(input_ids=tokens, position_ids=positions).logits.sum()
    assert most[0] == num_layers * one_layer
    assert not any(storage() is not None for storage, _ in live)  # autograd keeps none
    most[0] = 0
    loss.backward()
    frozen = [n for n in range(5) if n not in active and n >= (0 if train_embedding else min(active, default=5))]
    beside = any(n + 1 in frozen for n in frozen)
    assert most[0] == (one_layer * (num_layers if beside else 1) if frozen else 0)
    assert not any(storage() is not None for storage, _ in live)
    assert host_layers._shuttle._coming == []


def test_each_layer_is_fetched_as_often_as_it_runs(monkeypatch):
    """Counted on meta: nothing is prefetched in vain, nothing is fetched for an active layer."""
    with META:
        model = make_llama(layers=5).train()
    model.requires_grad_(False)
    model.model.layers[2].requires_grad_(True)
    stream(model, META).place()
    to_device, fetched = offload.to_device, []
    monkeypatch.setattr(offload, "to_device", lambda t, d: fetched.append(id(t)) or to_device(t, d))
    tokens, positions = torch.zeros(1, 8, dtype=torch.int64, device="meta"), torch.arange(8, device="meta")[None]
    for _ in range(2):
        fetched.clear()
        model(input_ids=tokens, position_ids=positions).logits.sum().backward()
        times = [{fetched.count(id(p)) for p in layer.parameters()} for layer in model.model.layers]
        assert times == [{1}, {1}, {0}, {2}, {2}]


def test_lora_layers_are_streamed_but_for_their_adapters():
    from peft import LoraConfig, get_peft_model

    def make():
        model = make_llama()
        settings = LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.2, target_modules="all-linear")
        torch.manual_seed(0)
        return get_peft_model(model, settings)

    plain, model = make(), make()
    host_layers = stream(model)
    host_layers.place()
    adapters = {id(p) for name, p in model.named_parameters() if "lora_" in name}
    assert not adapters & {id(p) for p in host_layers._in_host}
    assert len(host_layers._in_host) == 4 * 9
    train(plain, 6)
    train(model, 6, host_layers=host_layers)
    assert_same_weights(model, plain)
    host_layers.remove(CPU)
    assert_same_weights(model.merge_and_unload(), plain.merge_and_unload())


def test_frozen_layers_are_host_memory_to_the_ledger():
    with Ledger(granularity=1) as ledger:
        with META:
            model = make_llama(layers=5).train()
        for parameter in model.parameters():  # made before the ledger could see some of them
            ledger.book(parameter, "weights")
        whole = ledger.total_bytes
        layer = tensor_bytes(model.model.layers[0].parameters())
        host_layers = stream(model, META)
        assert ledger.host_bytes == host_layers.host_bytes() == 5 * layer
        assert ledger.total_bytes == whole - 5 * layer
        for active in (1, 3):
            model.model.layers.requires_grad_(False)
            model.model.layers[active].requires_grad_(True)
            host_layers.place()
            assert ledger.host_bytes == host_layers.host_bytes() == 4 * layer
            assert ledger.total_bytes == whole - 4 * layer
        tokens, positions = torch.zeros(1, 1, dtype=torch.int64, device="meta"), torch.zeros(1, 1, device="meta").long()
        ledger.reset_peak()
        with torch.no_grad():
            model.model(input_ids=tokens, position_ids=positions)
        # one token's activations are small beside a layer
        assert whole - 2 * layer <= ledger.peak_bytes < whole - 2 * layer + layer // 4


def test_what_is_saved_is_right_wherever_a_parameter_lies(tmp_path):
    from transformers import LlamaForCausalLM

    plain, model = make_llama(), make_llama()
    train(plain, 6, engine=make_engine(plain))
    train(model, 6, engine=make_engine(model), host_layers=stream(model))
    model.save_pretrained(tmp_path)
    assert_same_weights(LlamaForCausalLM.from_pretrained(tmp_path), plain)
    fresh = make_llama(seed=1)
    stream(fresh).place()
    fresh.load_state_dict(model.state_dict())
    assert_same_weights(fresh, plain)
    ids = torch.arange(3, 11)[None]
    assert torch.equal(fresh.eval()(input_ids=ids).logits, plain.eval()(input_ids=ids).logits)


def test_removing_it_leaves_checkpointed_layers():
    plain, model = make_llama().train(), make_llama().train()
    host_layers = stream(model)
    host_layers.remove(CPU)
    assert host_layers.host_bytes() == 0
    for m in (plain, model):
        ids = torch.arange(3, 11)[None]
        m(input_ids=ids, labels=ids).loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    HostLayers(find_layers(model).decoder, CPU)


def test_a_deep_copy_streams_layers_of_its_own():
    model = make_llama().train()
    stream(model)
    model.requires_grad_(False)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    ids = torch.arange(3, 11)[None]
    assert torch.equal(other.eval()(input_ids=ids).logits, make_llama().eval()(input_ids=ids).logits)


def test_hooks_of_a_layer_run_once_in_the_forward_pass():
    model, ran = make_llama().train(), []
    model.model.layers[1].register_forward_hook(lambda *_: ran.append(1))
    host_layers = stream(model)
    model.model.layers.requires_grad_(False)
    host_layers.place()
    ids = torch.arange(3, 11)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert ran == [1]


def test_a_frozen_layer_computes_with_copies_and_an_active_one_with_its_parameters():
    model, same = make_llama().train(), {}
    parameters = [layer.mlp.up_proj.weight for layer in model.model.layers]
    for number, layer in enumerate(model.model.layers):
        layer.mlp.up_proj.register_forward_pre_hook(
            lambda module, _args, number=number: same.setdefault(number, []).append(
                module.weight is parameters[number] and module.weight.data_ptr() == parameters[number].data_ptr()
            )
        )
    host_layers = stream(model)
    model.model.layers.requires_grad_(False)
    model.model.layers[2].requires_grad_(True)
    host_layers.place()
    ids = torch.arange(3, 11)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert same == {number: [number == 2] * 2 for number in range(4)}


def test_after_a_forward_pass_that_failed_the_next_draw_finds_nothing_stale():
    with META:
        model = make_llama().train()
    model.requires_grad_(False)
    host_layers = stream(model, META)

    def fail(*_):
        raise ArithmeticError

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        model(input_ids=torch.zeros(1, 8, dtype=torch.int64, device="meta"))
    handle.remove()
    assert host_layers._shuttle._coming != []
    host_layers.place()
    assert host_layers._shuttle._coming == []


def test_refusals():
    model = make_llama().train()
    decoder = find_layers(model).decoder
    with pytest.raises(UserError, match=r"call checkpoint_layers\(decoder\) first"):
        HostLayers(decoder, CPU)
    checkpoint_layers(decoder, 3)
    with pytest.raises(UserError, match="only if all decoder layers are checkpointed"):
        HostLayers(decoder, CPU)
    model = make_llama().train()
    stream(model)
    with pytest.raises(UserError, match="streamed already"):
        HostLayers(find_layers(model).decoder, CPU)
    with pytest.raises(UserError, match=r"of decoder layer 0 trains, but is in host memory: call HostLayers.place"):
        model(input_ids=torch.arange(3, 11)[None])


def test_the_rest_is_moved_to_the_device(monkeypatch):
    """Seen by what is asked to move, for there is one memory here."""
    model, moved = make_llama(), []
    monkeypatch.setattr(torch.Tensor, "to", lambda t, device: moved.append(t.data_ptr()) or t)
    rest_to_device(model, model.model.layers, CPU)
    expected = [model.model.embed_tokens.weight, model.model.norm.weight, model.lm_head.weight, *model.buffers()]
    assert sorted(moved) == sorted(t.data_ptr() for t in expected)


@needs_cuda
@pytest.mark.parametrize("method", ["lisa", "lora"])
def test_cuda_weights_are_those_of_the_plain_run(method):
    from peft import LoraConfig, get_peft_model

    def make():
        model = make_llama(layers=8, hidden_size=256, intermediate_size=1024)
        if method == "lora":
            torch.manual_seed(0)
            settings = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
            model = get_peft_model(model, settings)
        return model

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        device = torch.device("cuda")
        plain, model = make().to(device), make()
        rest_to_device(model, find_layers(model).decoder, device)
        host_layers = stream(model, device, offload_inputs=True)
        engines = [make_engine(plain), make_engine(model)] if method == "lisa" else [None, None]
        host_layers.place()
        train(plain, 26, engine=engines[0], device=device)
        optimizer = make_adamw(model)
        train(model, 26, engine=engines[1], host_layers=host_layers, optimizer=optimizer, device=device)
        assert all(p.is_pinned() for p in host_layers._in_host)
        assert model.device.type == "cuda"
        for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(a.cpu(), b.cpu()), name
    finally:
        torch.use_deterministic_algorithms(False)


@needs_cuda
def test_cuda_two_frozen_layers_at_most_are_on_the_device():
    def peak(streamed):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        model = make_llama(layers=16, hidden_size=1024, intermediate_size=4096).train()
        model.requires_grad_(False)
        model.model.layers[8].requires_grad_(True)
        decoder = find_layers(model).decoder
        checkpoint_layers(decoder)
        if streamed:
            HostLayers(decoder, torch.device("cuda")).place()
            rest_to_device(model, decoder, torch.device("cuda"))
        else:
            model.cuda()
        torch.cuda.reset_peak_memory_stats()
        ids = torch.randint(3, VOCABULARY, (1, 64), device="cuda")
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
        return torch.cuda.max_memory_allocated() - before, tensor_bytes(decoder[0].parameters())

    plain, one = peak(False)
    streamed, _ = peak(True)
    assert plain - streamed > 12 * one  # of 15 frozen layers


def test_the_model_that_is_streamed_is_not_wrapped():
    """What transformers reads of a model stays: its device, its state's names, its class."""
    model = make_llama()
    names, kind = list(model.state_dict()), type(model)
    stream(model)
    assert model.device == CPU
    assert list(model.state_dict()) == names
    assert type(model) is kind
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
