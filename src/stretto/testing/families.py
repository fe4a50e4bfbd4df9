"""Tiny random models of every causal-LM family that the installed transformers knows.

The configuration of a family is its own default with the sizes made small by name: what makes a
family itself (which layers, masks, positions, norms) stays as the library declares it, and
thresholds that would hide an effect at a few tokens (windows, chunks) shrink with the sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, WINDOW = 64, 4, 2, 16, 128, 8

#: Field name -> small value. A field that a family lacks, or leaves None or off, stays as it is.
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "emb_dim", "embed_dim", "word_embed_proj_dim"), HIDDEN
    ),
    **dict.fromkeys(("embedding_size", "attention_hidden_size", "lru_width", "dim"), HIDDEN),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), HEADS
    ),
    **dict.fromkeys(("encoder_attention_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), KV_HEADS),
    **dict.fromkeys(("num_kv_heads", "multi_query_group_num", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "swa_head_dim", "global_head_dim", "d_kv"), HEAD_DIM),
    **dict.fromkeys(("v_head_dim", "qk_head_dim", "index_head_dim", "rotary_dim"), HEAD_DIM),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), HEAD_DIM // 2),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "laurel_rank"), 16),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "d_ff",
            "n_inner",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "ffn_hidden_size",
            "dim_ff",
            "intermediate_size_mlp",
            "feed_forward_proj_dim",
            "block_ff_dim",
        ),
        2 * HIDDEN,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_intermediate_size",
            "shared_expert_intermediate_size",
            "shared_experts_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "expert_ffn_hidden_size",
            "moe_ffn_hidden_size",
        ),
        32,
    ),
    **dict.fromkeys(
        (
            "num_experts",
            "n_routed_experts",
            "num_local_experts",
            "moe_num_experts",
            "zero_expert_num",
        ),
        4,
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"), 2
    ),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "text_vocab_size"), VOCAB),
    **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), VOCAB),
    "hidden_size_per_layer_input": 16,
    **dict.fromkeys(
        ("sliding_window", "attention_chunk_size", "sliding_window_size", "window_size"), WINDOW
    ),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "model_max_length"), 512
    ),
    "n_ctx": 512,
    # Effects of long positions show at a few tokens.
    "floor_scale": 4,
    "index_topk": 4,
    "index_n_heads": 2,
    "mup_attn_scale_floor": 4,
    # Recurrent and convolutional layers.
    **dict.fromkeys(("mamba_n_heads", "n_mamba_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), HEAD_DIM),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_d_ssm", "mamba_intermediate_size"), 2 * HIDDEN),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "mamba_dt_rank", "time_step_rank"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), HEAD_DIM),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), HEADS),
}

#: Depths: three layers show a first, an inner and a last one.
DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
)
LAYERS = 3

#: What a default configuration lacks, contradicts or hides at this size, by its model type.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3]},
    # Its global part is as wide as cross_attn_k = 2 local ones.
    "blt_global_transformer": {"hidden_size": 2 * HIDDEN, "head_dim": 2 * HEAD_DIM},
    "blt_local_encoder": {"hidden_size_global": 2 * HIDDEN},
    "blt_local_decoder": {"hidden_size_global": 2 * HIDDEN},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {"attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_audio_encoder": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    "dots3_note_vision_encoder": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "intermediate_size": 2 * HIDDEN,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 100,
        "split_ngram_parts": 1,
        "hc_lowrank": 8,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD_DIM,
        "head_dim": 2 * HEAD_DIM,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD_DIM,
        "head_dim": 2 * HEAD_DIM,
    },
    "zaya": {"num_experts_per_tok": 1},
}

#: Fields that name a kind of layer per layer; one of each kind is kept, in the order they come.
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")


def names() -> list[str]:
    """Model types with a causal language model, in alphabetical order."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str) -> PretrainedConfig:
    """The family's default configuration with small sizes and a layer of each kind, 3 at least."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    config = kind(**small(kind(**_first_words(kind))))
    wanted = _model_class(family).config_class
    parts = (getattr(config, name, None) for name in config.sub_configs)
    # A composite model's language model may have a configuration of its own.
    if isinstance(config, wanted):
        return config
    return next((part for part in parts if type(part) is wanted), config)


def tiny_model(family: str, *, seed: int = 0) -> PreTrainedModel:
    """A float64 model of the family on the CPU in eval mode, weights drawn by torch seed `seed`."""
    torch.manual_seed(seed)
    # The grouped product of experts knows no float64.
    return (
        _model_class(family)
        ._from_config(tiny_config(family), dtype=torch.float64, experts_implementation="eager")
        .eval()
    )


def _model_class(family: str) -> type[PreTrainedModel]:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    found = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]
    return found[0] if isinstance(found, tuple) else found


def small(default: PretrainedConfig) -> dict[str, Any]:
    """Arguments for the class of this configuration that make it small."""
    values = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    known = {default.attribute_map.get(name, name): value for name, value in SIZES.items()}
    chosen = {
        name: known[name]
        for name, value in values.items()
        if name in known and isinstance(value, int) and not isinstance(value, bool) and value > 0
    }
    if "head_dim" in values:
        # Multi-head latent attention calls its rotary part the head.
        rotary = "qk_rope_head_dim" in chosen and values["head_dim"] == values["qk_rope_head_dim"]
        chosen["head_dim"] = chosen["qk_rope_head_dim"] if rotary else HEAD_DIM
    _keep_head_ratio(chosen, values)
    chosen.update(_layers(values))
    chosen.update(_special_tokens(values))
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if part is not None:
            chosen[name] = small(part)
    chosen |= OWN.get(default.model_type, {})
    if isinstance(chosen.get("layer_types"), list):
        chosen["num_hidden_layers"] = len(chosen["layer_types"])
    if isinstance(chosen.get("layers_block_type"), list):
        chosen["num_hidden_layers"] = len(chosen["layers_block_type"])
    return chosen


def _first_words(kind: type[PretrainedConfig]) -> dict[str, Any]:
    """What a configuration class needs to accept its own defaults."""
    if kind.model_type == "gemma4_assistant":
        none = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
        return {"text_config": {"model_type": "gemma4_text", **none}}
    return {}


def _keep_head_ratio(chosen: dict[str, Any], values: dict[str, Any]) -> None:
    """Full and single key heads stay what they are."""
    heads = values.get("num_attention_heads")
    kv_heads = values.get("num_key_value_heads")
    if "num_key_value_heads" in chosen and heads and kv_heads:
        chosen["num_key_value_heads"] = HEADS if kv_heads == heads else min(kv_heads, KV_HEADS)


def _layers(values: dict[str, Any]) -> dict[str, Any]:
    kinds = {name: list(values[name]) for name in KINDS if isinstance(values.get(name), list)}
    rows = list(zip(*kinds.values(), strict=False)) if kinds else []
    first = {row: place for place, row in reversed(list(enumerate(rows)))}
    kept = sorted(first.values())
    while rows and len(kept) < LAYERS and len(kept) < len(rows):
        kept = sorted([*kept, next(i for i in range(len(rows)) if i not in kept)])
    depth = len(kept) or LAYERS
    chosen: dict[str, Any] = {name: depth for name in DEPTHS if isinstance(values.get(name), int)}
    return chosen | {name: [kind[place] for place in kept] for name, kind in kinds.items()}


def _special_tokens(values: dict[str, Any]) -> dict[str, int]:
    """Token numbers that fit the small vocabulary, apart from those that tests use."""
    tokens = [name for name in values if name.endswith(("_token_id", "_token_index"))]
    numbers = range(VOCAB - 1, VOCAB - 1 - len(tokens), -1)
    return {name: n for name, n in zip(sorted(tokens), numbers, strict=True) if values[name]}
