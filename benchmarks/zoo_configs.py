"""Small random models of any type of transformers, by shrinking its default configuration by the names of its fields."""

from __future__ import annotations

import dataclasses
from typing import Any

VOCABULARY = 128
VISION_LAYERS = 3  # another number than the text model's 4, so that a mix-up shows

# size to the fields that are cut down to it
SIZES: dict[int, str] = {
    32: (
        "cross_attention_hidden_size d_embed d_model dim dim_model emb_dim embed_dim embedding_size "
        "encoder_hidden_size hidden_size model_dim n_embd text_hidden_size word_embed_proj_dim"
    ),
    64: (
        "d_ff decoder_ffn_dim dense_intermediate_size dff dim_ff encoder_ffn_dim feed_forward_size ffn_dim "
        "ffn_hidden_size intermediate_size intermediate_size_mlp max_position_embeddings max_seq_len "
        "max_seq_length max_sequence_length max_source_positions max_target_positions mlp_hidden_size n_ctx "
        "n_inner n_positions original_max_position_embeddings"
    ),
    16: (
        "expert_ffn_hidden_size expert_intermediate_size moe_intermediate_size moe_shared_expert_intermediate_size "
        "o_lora_rank q_lora_rank shared_expert_intermediate_size shared_intermediate_size"
    ),
    8: (
        "attention_head_dim d_kv global_head_dim head_dim hidden_size_per_layer_input index_head_dim "
        "indexer_head_dim kv_channels kv_lora_rank linear_key_head_dim linear_value_head_dim mamba_d_head "
        "mamba_d_state mamba_head_dim mamba_headdim mamba_state_dim qk_nope_head_dim qk_rope_head_dim "
        "ssm_state_size state_size swa_head_dim swa_v_head_dim v_head_dim"
    ),
    4: (
        "attention_heads decoder_attention_heads decoder_layers depth encoder_attention_heads encoder_layers "
        "encoder_num_layers global_num_attention_heads index_n_heads index_topk indexer_heads linear_num_key_heads "
        "linear_num_value_heads moe_num_experts n_experts n_head n_heads n_layer n_layers n_routed_experts "
        "num_attention_head num_attention_heads num_blocks num_decoder_attention_heads num_decoder_layers "
        "num_encoder_attention_heads num_encoder_layers num_experts num_global_attention_heads num_heads "
        "num_hidden_layers num_layers num_linear_attention_heads num_local_experts swa_num_attention_heads"
    ),
    2: (
        "moe_k moe_topk n_kv_heads num_expert_per_tok num_experts_per_tok num_experts_per_token "
        "num_global_key_value_heads num_key_value_heads num_kv_heads swa_num_key_value_heads top_k_experts"
    ),
    1: (
        "decoder_sparse_step first_k_dense_replace mamba_n_groups n_group n_groups n_shared_experts "
        "num_dense_layers num_expert_group num_nextn_predict_layers num_shared_experts topk_group topk_groups"
    ),
    VOCABULARY: (
        "decoder_vocab_size encoder_vocab_size entity_vocab_size n_vocab src_vocab_size text_vocab_size "
        "tgt_vocab_size vocab_size vocab_size_per_layer_input"
    ),
}
FIELDS = {name: size for size, names in SIZES.items() for name in names.split()}
VISION = {
    "image_size": 32, "patch_size": 8, "num_hidden_layers": VISION_LAYERS, "depth": VISION_LAYERS,
    "num_layers": VISION_LAYERS, "n_layers": VISION_LAYERS, "encoder_layers": VISION_LAYERS, "layers": VISION_LAYERS,
    "out_hidden_size": 32, "projection_dim": 32, "output_dim": 32, "num_heads": 4, "vision_output_dim": 32,
}  # fmt: skip
# what names cannot know, by model type; None: leave the field out
FIXES: dict[str, dict[str, Any]] = {
    "bamba": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "attn_layer_indices": [1, 3],
    },
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
    },
    "ctrl": {"dff": 64},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 4,
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {
        "topk_group": 1,
        "n_group": 1,
        "num_experts_per_tok": 2,
        "topk_method": "greedy",
        "moe_layer_freq": 1,
    },
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
    },
    "ernie4_5_vl_moe": {"mm_layer": 1},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_chunk_size": 8, "mamba_d_state": 8},
    "gemma3n_text": {
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 8,
        "activation_sparsity_pattern": None,
        "intermediate_size": [64, 64, 64, 64],
    },
    "gemma4_text": {
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "gemma4_unified_text": {
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "glm46v_text": {
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 1.0,
        },
    },
    "glm4v_moe_text": {
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 1.0,
        },
    },
    "glm4v_text": {
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 1.0,
        },
    },
    "glm_ocr_text": {
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 1.0,
        },
    },
    "glmga_text": {
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 1.0,
        },
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "jetmoe": {"num_key_value_heads": 4, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 1},
    "kimi_linear": {"kda_head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "block_multiple_of": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "musicgen_decoder": {"num_codebooks": 2, "vocab_size": 128},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe", "mamba"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "num_hidden_layers": None,
    },
    "paddleocr_vl_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    },
    "qwen2_5_omni_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    },
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
    "qwen2_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 4,
        "heads_per_ngram": 2,
        "hc_lowrank": 8,
        "make_ngram_vocab_size_divisible_by": 8,
    },
    "recurrent_gemma": {
        "lru_width": 32,
        "num_key_value_heads": 1,
        "attention_window_size": 8,
        "block_types": ["recurrent", "attention"],
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "num_buckets": 2,
        "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4,
        "attention_head_size": 8,
        "feed_forward_size": 64,
    },
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "roc_bert": {"pronunciation_vocab_size": 16, "shape_vocab_size": 16},
    "rwkv": {"attention_hidden_size": 32, "intermediate_size": 64, "context_length": 64},
    "step3p7_text": {"sliding_window": 8},
    "whisper": {"max_source_positions": 32, "max_target_positions": 64},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0, "v_dim_factor": 1.0, "chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "attention_hidden_size": 64,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "n_mamba_heads": 8,
        "mamba_d_state": 8,
        "chunk_size": 8,
        "adapter_rank": 4,
    },
}


def shrink(config_class: Any, role: str = "text") -> Any:
    """An instance of ``config_class``, small. ``role``: ``text``, or ``vision`` for a tower."""
    base = config_class()
    parts = dict(getattr(config_class, "sub_configs", {}) or {})
    names = (
        [f.name for f in dataclasses.fields(config_class)]
        if dataclasses.is_dataclass(config_class)
        else list(base.to_dict())
    )
    chosen = {}
    for name in names:
        if not name.startswith("_") and name not in parts:
            value = _smaller(name, _get(base, name), role)
            chosen |= {} if value is None else {name: value}
    for name in parts:
        part = _get(base, name)
        if hasattr(type(part), "model_type"):
            chosen[name] = shrink(type(part), _role(name))
    chosen |= _kinds_of_layers(base, names, chosen)
    if role == "text":
        chosen |= _heads(base, names, chosen)
    chosen |= FIXES.get(config_class.model_type, {})
    return config_class(**{name: value for name, value in chosen.items() if value is not None})


def _smaller(name: str, value: Any, role: str) -> Any:
    """The field's small value; None where it stays as it is."""
    if isinstance(value, float) and "drop" in name:
        return 0.0
    if role == "vision" and name in VISION and isinstance(value, int | list | tuple):
        return VISION[name] if isinstance(value, int) else type(value)([VISION[name]] * len(value))
    if name in FIELDS and isinstance(value, int) and not isinstance(value, bool):
        return min(value, FIELDS[name]) if value > 0 else None
    if name.endswith("token_id") and isinstance(value, list | tuple):
        return [2]
    if name.endswith(("token_id", "token_index")) and isinstance(value, int):
        usual = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        return usual.get(name, value if 0 <= value < VOCABULARY else 100 + len(name) % 25)
    return None


def _role(name: str) -> str:
    text = any(word in name for word in ("text", "decoder", "llm", "language", "thinker"))
    return "text" if text and "vision" not in name and "audio" not in name else "vision"


def _kinds_of_layers(base: Any, names: list[str], chosen: dict[str, Any]) -> dict[str, Any]:
    """Lists that say of each layer what it is: every kind once, in their order."""
    counts = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    num_layers = next((chosen[name] for name in counts if name in chosen), 4)
    lists = {}
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        kinds = list(dict.fromkeys(_get(base, name) or [])) if name in names else []
        if kinds:
            lists[name] = [kinds[i % len(kinds)] for i in range(num_layers)]
    return lists


def _heads(base: Any, names: list[str], chosen: dict[str, Any]) -> dict[str, Any]:
    """Widths and numbers of heads that fit together, blocks of state space models, and sections of rotary positions."""
    heads, more = chosen.get("num_attention_heads", 4), dict[str, Any]()
    if "num_key_value_heads" in names and ("kv_lora_rank" in names or _get(base, "num_key_value_heads") is None):
        more["num_key_value_heads"] = heads
    if "head_dim" in names and _get(base, "head_dim") is None:
        more["head_dim"] = 8
    blocks = ("chunk_size", "mamba_chunk_size", "mamba_chunk_length")
    more |= {name: 8 for name in blocks if name in names and isinstance(_get(base, name), int)}
    more |= {"rotary_dim": 4} if "rotary_dim" in names else {}
    more |= {"mamba_n_heads": 8, "mamba_d_head": 8} if "mamba_n_heads" in names else {}
    for name in ("rope_parameters", "rope_scaling"):
        value = _get(base, name)
        if name in names and isinstance(value, dict) and "mrope_section" in value:
            more[name] = {**value, "mrope_section": [2, 1, 1]}
    return more


def _get(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # a property that needs what is not there
        return None
