"""Tiny configurations of the families that PreScope runs, for tests that walk over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.checkpoints import write_checkpoint

HIDDEN, EXPERTS, TOP_K, LAYERS, VOCAB = 32, 8, 3, 2, 160

# One value for each name that any family gives to a size; a family takes those it knows.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "max_position_embeddings": 256,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "top_k_experts": TOP_K,
    "moe_k": TOP_K,
    "moe_topk": TOP_K,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "decoder_sparse_step": 1,
    "num_dense_layers": 0,
    "moe_layer_start_index": 0,
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "sliding_window": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_dt_rank": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(model_type: str, **extra: Any) -> Any:
    """Return a small configuration of one family; `extra` overrides the common sizes."""
    return _small(model_type, _SIZES, extra)


def _small(model_type: str, values: dict[str, Any], extra: dict[str, Any]) -> Any:
    kind = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    renamed = set(kind.attribute_map.values())
    sizes = {name: value for name, value in values.items() if name in known - renamed}
    sizes |= {
        name: value
        for name, value in values.items()
        if name in known & renamed and name not in sizes
    }
    return kind(**sizes | extra)


# The same for what a model sees and hears with; nobody looks or listens here.
_SENSES: dict[str, Any] = {
    "adapter_in_dim": HIDDEN,
    "adapter_out_dim": HIDDEN,
    "deepstack_visual_indexes": [0],
    "depth": 1,
    "depths": [1],
    "head_dim": 16,
    "hidden_size": HIDDEN,
    "hidden_sizes": [HIDDEN],
    "image_size": 28,
    "in_channels": 3,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": HIDDEN,
    "patch_size": 14,
    "patch_sizes": [16],
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "posemb_grid_size": 4,
    "position_embedding_size": 64,
    "projection_hidden_dim": 32,
    "projection_intermediate_size": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "spatial_merge_size": 2,
    "text_hidden_size": HIDDEN,
    "vision_output_dim": 32,
    "d_model": 32,
    "downsample_hidden_size": 32,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "encoder_layers": 1,
    "num_mel_bins": 16,
    "output_dim": HIDDEN,
}


def tiny_wrapper(model_type: str, **parts: dict[str, Any]) -> Any:
    """Return a small configuration of a family that keeps a text model inside.

    `parts` override the sizes of the configurations inside; `model_type` in one of them says of
    which family it is, where the wrapper leaves that open.
    """
    kind = CONFIG_MAPPING[model_type]
    inner = {}
    for name, sub in kind.sub_configs.items():
        extra = dict(parts.get(name, {}))
        family = extra.pop("model_type", None) or sub.model_type
        if name == "text_config":
            inner[name] = tiny(family, **extra)
        else:
            inner[name] = _small(family, _SENSES, extra)
    return kind(**{name: config.to_dict() for name, config in inner.items()})


def _family(model_type: str, **extra: Any) -> Callable[[], Any]:
    return lambda: tiny(model_type, **extra)


def _wrapper(model_type: str, **parts: dict[str, Any]) -> Callable[[], Any]:
    return lambda: tiny_wrapper(model_type, **parts)


FAMILIES: dict[str, Callable[[], Any]] = {
    "mixtral": _family("mixtral"),
    "qwen2_moe": _family("qwen2_moe"),
    "qwen3_moe": _family("qwen3_moe"),
    "qwen3_next": _family("qwen3_next", layer_types=["linear_attention", "full_attention"]),
    "olmoe": _family("olmoe"),
    "deepseek_v2": _family("deepseek_v2", num_key_value_heads=4),
    "deepseek_v3": _family("deepseek_v3", num_key_value_heads=4),
    "gpt_oss": _family("gpt_oss"),
    "glm4_moe": _family("glm4_moe"),
    "granitemoe": _family("granitemoe"),
    "minimax_m2": _family("minimax_m2"),
    "jamba": _family("jamba", attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False),
}

_HYBRID = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
_WIDE_KV = {"num_key_value_heads": 4}
_SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
_QWEN4_EXP = {
    **_HYBRID,
    "heads_per_ngram": 2,
    "hc_lowrank": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "indexer_head_dim": 16,
    "indexer_kv_heads": 1,
    "indexer_n_heads": 2,
    "ngram_vocab_size_base": 1000,
    "ple_embed_dim": 16,
    "split_ngram_parts": 2,
}

_LLAMA4 = {
    "interleave_moe_layer_step": 1,
    "intermediate_size_mlp": 48,
    "num_experts_per_tok": 1,
}

# The other families whose experts can be run here and that write text.
MORE_FAMILIES: dict[str, Callable[[], Any]] = {
    **{
        name: _family(name)
        for name in (
            "afmoe",
            "aria_text",
            "cohere2_moe",
            "deepseek_v4",
            "dots1",
            "ernie4_5_moe",
            "exaone_moe",
            "flex_olmo",
            "granitemoe_swa",
            "granitemoeshared",
            "hy_v3",
            "hy_v4",
            "inkling2_text",
            "inkling_text",
            "kolibri1",
            "laguna",
            "mellum",
            "mimo_v2_flash",
            "minimax",
            "minimax_m3_vl_text",
            "nemotron_h",
            "phimoe",
            "solar_open",
        )
    },
    **{
        name: _family(name, **_WIDE_KV)
        for name in (
            "axk1",
            "axk2",
            "deepseek_v32",
            "dots3_note_text",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "mistral4",
        )
    },
    **{name: _wrapper(name) for name in ("inkling2", "minimax_m3_vl")},
    "aria": _wrapper("aria", vision_config={"model_type": "idefics3_vision"}),
    "bailing_hybrid": _family("bailing_hybrid", **_HYBRID, **_WIDE_KV),
    "beam": _family("beam", **_SPARSE),
    "dots3_note": _wrapper(
        "dots3_note",
        text_config=_WIDE_KV,
        vision_config={
            "mlp_layer_types": ["dense", "sparse"],
            "num_hidden_layers": 2,
            "per_layer_config": {1: {"num_experts_per_tok": 2, "num_local_experts": 4}},
        },
        audio_config={"adapter_input_size": HIDDEN},
    ),
    "ernie4_5_vl_moe": _wrapper(
        "ernie4_5_vl_moe",
        text_config={"moe_intermediate_size": [24, 16], "rope_parameters": _MROPE},
    ),
    "flint": _family("flint", mlp_only_layers=[]),
    "gemma4": _wrapper(
        "gemma4", text_config={"enable_moe_block": True, "vocab_size_per_layer_input": VOCAB}
    ),
    "gemma4_text": _family("gemma4_text", enable_moe_block=True, vocab_size_per_layer_input=VOCAB),
    "glm4v_moe": _wrapper(
        "glm4v_moe",
        text_config={
            "rope_parameters": {
                **_MROPE,
                "mrope_section": [1, 1, 0],
                "partial_rotary_factor": 0.5,
            }
        },
    ),
    "glm5_next": _wrapper(
        "glm5_next",
        text_config={
            **_HYBRID,
            **_WIDE_KV,
            "first_k_dense_replace": 0,
            "head_dim": 0,
            "index_kpool": 4,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "qk_rope_head_dim": 0,
        },
    ),
    "granitemoehybrid": _family(
        "granitemoehybrid", layer_types=["linear_attention", "full_attention"]
    ),
    "hunyuan_v1_moe": _family("hunyuan_v1_moe", head_dim=16),
    "kimi_linear": _family(
        "kimi_linear", **_HYBRID, **_WIDE_KV, linear_head_dim=8, linear_num_heads=4
    ),
    "lfm2_moe": _family("lfm2_moe", layer_types=["conv", "full_attention"]),
    "llama4": _wrapper("llama4", text_config=_LLAMA4),
    "llama4_text": _family("llama4_text", **_LLAMA4 | {"num_experts_per_tok": TOP_K}),
    "longcat_flash": _family(
        "longcat_flash",
        **_WIDE_KV,
        expert_ffn_hidden_size=24,
        ffn_hidden_size=48,
        num_layers=LAYERS,
        zero_expert_num=4,
    ),
    "mistral_large4": _wrapper(
        "mistral_large4",
        text_config={"head_dim": 8, **_WIDE_KV},
        vision_config={"model_type": "pixtral"},
    ),
    "muse_spark": _wrapper("muse_spark", text_config={"moe_hidden_size": 32}),
    "qwen3_5_moe": _wrapper("qwen3_5_moe", text_config=_HYBRID),
    "qwen3_5_moe_text": _family("qwen3_5_moe_text", **_HYBRID),
    "qwen3_omni_moe_thinker": _wrapper(
        "qwen3_omni_moe_thinker", text_config={"rope_parameters": _MROPE}
    ),
    "qwen3_vl_moe": _wrapper("qwen3_vl_moe", text_config={"rope_parameters": _MROPE}),
    "qwen4_exp": _wrapper("qwen4_exp", text_config=_QWEN4_EXP),
    "qwen4_exp_text": _family("qwen4_exp_text", **_QWEN4_EXP),
    "step3p7": _wrapper(
        "step3p7",
        text_config={
            "layer_types": ["full_attention"] * 3,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "num_hidden_layers": 3,
            "share_expert_dim": 24,
            "swiglu_limits": [0.0, 0.0, 0.05],
        },
    ),
    "zaya": _family("zaya", num_experts_per_tok=1),
}


# How far logits may be from stock, as a share of their spread, where not to the last bit: llama4's
# stock block runs all experts on all tokens in one batched product, which rounds otherwise.
BOUNDS = {"llama4": 1e-5, "llama4_text": 1e-5}


def make_checkpoint(name: str, folder: Path, dtype: str = "float32") -> Path:
    """Write a random checkpoint of family `name` into `folder` as the hub would hold it."""
    write_checkpoint((FAMILIES | MORE_FAMILIES)[name](), folder, dtype)
    return folder
