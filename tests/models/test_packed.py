"""Packed rows without a mask: each document is computed as if it were alone, and as with the mask."""

import pytest
import torch
import transformers as hf
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import create_causal_mask

from lisatune.layers import find_layers
from lisatune.levers.gradient_checkpointing import checkpoint_layers
from lisatune.models.attention import set_attention
from lisatune.models.packed import PACKED, Documents, attention, check_packing, varlen
from tiny import make_llama

SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))]  # fmt: skip
MODELS = {
    "llama": make_llama,
    "a window of 5": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SIZES, sliding_window=5)),
    "windows and whole": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"])
    ),
    "dropout": lambda: make_llama(attention_dropout=0.1),
    "wider queries": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **SIZES | {"num_key_value_heads": 4}, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8,
            v_head_dim=8, n_group=1, topk_group=1, n_routed_experts=4, moe_intermediate_size=8, first_k_dense_replace=2,
            num_experts_per_tok=2,
        )
    ),
}  # fmt: skip


def packed_rows():
    """Rows of several documents, of one, and of one whose padding begins anew."""
    lengths = [(7, 20, 13), (40,), (39, 1)]
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    torch.manual_seed(1)
    return torch.randint(3, 120, positions.shape), positions


def hidden_and_gradients(model, ids, positions):
    model.zero_grad()
    torch.manual_seed(2)  # of dropout
    hidden = model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    (hidden * torch.linspace(-1, 1, hidden.numel(), device=hidden.device).view_as(hidden)).sum().backward()
    return [hidden.detach(), *(p.grad.clone() for p in model.model.parameters())]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", MODELS)
def test_hidden_states_and_gradients_are_those_with_the_mask(kind, device):
    torch.manual_seed(0)
    model = MODELS[kind]().to(device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    ids, positions = (t.to(device) for t in packed_rows())
    masked = hidden_and_gradients(model, ids, positions)
    set_attention(model, "auto", packing=True)
    assert model.config._attn_implementation == PACKED
    within = (
        1e-5 if device.type == "cpu" else 0.05
    )  # float32 adds up in another order: 4e-7 seen; bfloat16 has 3 digits
    for with_mask, without in zip(masked, hidden_and_gradients(model, ids, positions), strict=True):
        assert (with_mask - without).abs().max() <= within * with_mask.abs().max()
    check_packing(find_layers(model), device)
    assert model.config._attn_implementation == PACKED


def test_the_kernel_for_a_gpu_is_called_as_it_wants():
    """Shapes alone, on the meta device: four heads of queries, two of keys and values."""
    documents = Documents(packed_rows()[1] == 0, torch.device("meta"))
    made = [
        torch.empty(3, heads, 40, 64, device="meta", dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)
    ]
    out = varlen(*made, documents, None)
    assert out.shape == (3, 40, 4, 64)
    assert [grad.shape for grad in torch.autograd.grad(out.sum(), made)] == [t.shape for t in made]
    assert documents.edges == [0, 7, 27, 40, 80, 119, 120]


def test_heads_that_lie_otherwise_in_memory_are_computed_with_the_mask():
    """The kernel reads the numbers of a head one after the other, and is wrong where they are apart."""
    module, documents = nn.Module(), Documents(packed_rows()[1] == 0, CPU)
    heads = torch.randn(3, 4, 8, 40).transpose(2, 3)
    expected, _ = attention(module, heads.contiguous(), heads.contiguous(), heads.contiguous(), documents)
    got, _ = attention(module, heads, heads, heads, documents)
    assert torch.allclose(got, expected, atol=1e-6)  # rounding of float32


def test_checkpointed_layers_give_the_same_bits():
    model = make_llama()
    set_attention(model, "auto", packing=True)
    plain = hidden_and_gradients(model, *packed_rows())
    checkpoint_layers(find_layers(model).decoder)
    assert all(map(torch.equal, plain, hidden_and_gradients(model, *packed_rows())))


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, torch.Tensor):
                self.largest = max(self.largest, made.numel())
        return out


def test_no_mask_is_made():
    model, (ids, positions) = make_llama(layers=1), packed_rows()
    ids, positions = ids.repeat(1, 10), positions.repeat(1, 10)  # 400 tokens a row; the widest activation has 64 each
    with Largest() as with_mask:
        model.model(input_ids=ids, position_ids=positions, use_cache=False)
    set_attention(model, "auto", packing=True)
    with Largest() as without:
        model.model(input_ids=ids, position_ids=positions, use_cache=False)
    assert with_mask.largest == 3 * 400 * 400
    assert without.largest == 3 * 400 * 64


def test_the_documents_found_are_those_of_the_mask():
    model, (ids, positions) = make_llama(), packed_rows()
    asked = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": None, "past_key_values": None}
    asked["position_ids"] = positions
    mask = create_causal_mask(model.config, **asked)
    set_attention(model, "auto", packing=True)
    documents = create_causal_mask(model.config, **asked)
    assert isinstance(documents, Documents)
    assert torch.equal(documents.mask, mask)
    assert list(documents.places()) == [(0, 0, 7), (0, 7, 27), (0, 27, 40), (1, 0, 40), (2, 0, 39), (2, 39, 40)]
    assert documents.longest == 40
    plain = asked | {"position_ids": torch.arange(40).repeat(3, 1)}
    assert create_causal_mask(model.config, **plain) is None
    seen_by_all = torch.zeros(3, 40, dtype=torch.int64)  # as parts of an image
    assert isinstance(create_causal_mask(model.config, **asked, block_sequence_ids=seen_by_all), torch.Tensor)
    padded = asked | {"attention_mask": torch.ones(3, 40).tril(38)}
    assert isinstance(create_causal_mask(model.config, **padded, allow_is_causal_skip=False), torch.Tensor)


def test_a_model_that_works_on_the_mask_itself_gets_one():
    model = make_llama()
    set_attention(model, "auto", packing=True)

    def reads_the_mask(_module, _args, kwargs):
        mask = kwargs["attention_mask"]
        assert mask is None or mask.shape[-1] == mask.shape[-2]

    model.model.layers[1].register_forward_pre_hook(reads_the_mask, with_kwargs=True)
    check_packing(find_layers(model), CPU)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_drops_the_documents_on_the_way_gets_a_mask():
    model = make_llama()
    set_attention(model, "auto", packing=True)

    def drops(_module, args, kwargs):
        lost = isinstance(kwargs["attention_mask"], Documents)
        return args, kwargs | ({"attention_mask": None} if lost else {})

    for layer in model.model.layers:
        layer.register_forward_pre_hook(drops, with_kwargs=True)
    check_packing(find_layers(model), CPU)
    assert model.config._attn_implementation == "sdpa"
