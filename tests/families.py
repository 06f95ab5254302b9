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
    kind = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    renamed = set(kind.attribute_map.values())
    sizes = {name: value for name, value in _SIZES.items() if name in known - renamed}
    sizes |= {
        name: value
        for name, value in _SIZES.items()
        if name in known & renamed and name not in sizes
    }
    return kind(**sizes | extra)


def tiny_wrapper(model_type: str, **parts: dict[str, Any]) -> Any:
    """Return a small configuration of a family that keeps a text model inside."""
    kind = CONFIG_MAPPING[model_type]
    inner = {name: tiny(sub.model_type, **parts[name]) for name, sub in kind.sub_configs.items()}
    return kind(**{name: config.to_dict() for name, config in inner.items()})


def _family(model_type: str, **extra: Any) -> Callable[[], Any]:
    return lambda: tiny(model_type, **extra)


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

# The other families whose experts use the common interface and that write text.
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
        )
    },
    "beam": _family("beam", **_SPARSE),
    "ernie4_5_vl_moe": lambda: tiny_wrapper(
        "ernie4_5_vl_moe",
        text_config={
            "moe_intermediate_size": [24, 16],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 2],
            },
        },
        vision_config={"depth": 1, "num_heads": 2, "spatial_merge_size": 2},
    ),
    "flint": _family("flint", mlp_only_layers=[]),
    "gemma4_text": _family("gemma4_text", enable_moe_block=True, vocab_size_per_layer_input=VOCAB),
    "granitemoehybrid": _family(
        "granitemoehybrid", layer_types=["linear_attention", "full_attention"]
    ),
    "hunyuan_v1_moe": _family("hunyuan_v1_moe", head_dim=16),
    "kimi_linear": _family(
        "kimi_linear", **_HYBRID, **_WIDE_KV, linear_head_dim=8, linear_num_heads=4
    ),
    "lfm2_moe": _family("lfm2_moe", layer_types=["conv", "full_attention"]),
    "qwen3_5_moe_text": _family("qwen3_5_moe_text", **_HYBRID),
    "zaya": _family("zaya", num_experts_per_tok=1),
}


def make_checkpoint(name: str, folder: Path, dtype: str = "float32") -> Path:
    """Write a random checkpoint of family `name` into `folder` as the hub would hold it."""
    write_checkpoint((FAMILIES | MORE_FAMILIES)[name](), folder, dtype)
    return folder
