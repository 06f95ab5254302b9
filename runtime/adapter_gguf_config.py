"""From GGUF metadata to the configuration that transformers has for the same model.

The values go through the same checks as those of a config.json. Widths that a file may state or
leave out are taken from its tensors; what llama.cpp fixes per architecture is written down here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from runtime.adapter_config import REFUSALS, _build
from runtime.adapter_gguf_mapped import mapped_config
from runtime.errors import ModelFilesError, UnsupportedModelError
from runtime.gguf_files import GgufFiles, logical_shape
from runtime.safetensors_files import TensorEntry

_AGAIN = "Download the model again, or choose another one."
_SOFTMAX, _SIGMOID = 1, 2
_NO_EXPERTS = {"llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "starcoder2", "mistral3"}


def read_gguf_config(files: GgufFiles) -> Any:
    """Return the configuration of the model in `files`, values checked.

    Raises:
        ModelFilesError: metadata is missing or out of range.
        UnsupportedModelError: the architecture cannot be run here.
    """
    told = _Metadata(files)
    family = FAMILIES.get(told.architecture)
    if family is None or (told.architecture == "llama" and not told.whole("expert_count", 0)):
        _refuse(told.architecture)
    try:
        raw = {**_shared(told), **family(told)}
        return _build(CONFIG_MAPPING[raw["model_type"]], raw, files.paths[0].name)
    except REFUSALS as error:
        raise ModelFilesError(
            f"The metadata of {files.paths[0].name} cannot be used: {error!s:.300}", _AGAIN
        ) from error


class _Metadata:
    """Typed access to the metadata under the architecture's own prefix."""

    def __init__(self, files: GgufFiles) -> None:
        self.metadata = files.metadata
        self._name = files.paths[0].name
        self.tensors: Mapping[str, TensorEntry] = files.tensors
        architecture = files.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise ModelFilesError(f"{self._name} states no architecture.", _AGAIN)
        self.architecture = architecture

    def whole(self, key: str, default: int | None = None) -> int:
        """Return an integer; a list of equal ones, one per layer, counts as one."""
        value = self._value(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if type(value) is not int:
            self.wrong(key, value)
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if type(value) not in (int, float):
            self.wrong(key, value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if type(value) is not bool:
            self.wrong(key, value)
        return value

    def text(self, key: str, default: str) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            self.wrong(key, value)
        return value

    def token(self, name: str) -> int | None:
        """Return the id of a special token, or None."""
        value = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int else None

    def has(self, leaf: str) -> bool:
        """Say whether any layer has a tensor `leaf`."""
        return any(name.endswith(f".{leaf}") for name in self.tensors)

    def size(self, leaf: str, axis: int) -> int:
        """Return one size of the tensor `leaf` of the first layer that has one, or 0."""
        for name, entry in self.tensors.items():
            if name.endswith(f".{leaf}") or name == leaf:
                shape = logical_shape(entry)
                return shape[axis] if -len(shape) <= axis < len(shape) else 0
        return 0

    def _value(self, key: str, default: Any) -> Any:
        full = f"{self.architecture}.{key}"
        value = self.metadata.get(full, default)
        if value is None:
            raise ModelFilesError(f"{self._name} does not state {full}.", _AGAIN)
        return value

    def wrong(self, key: str, value: Any) -> NoReturn:
        raise ModelFilesError(
            f"{self._name}: {self.architecture}.{key} is {str(value)[:60]!r}, which is not usable.",
            _AGAIN,
        )


def _shared(told: _Metadata) -> dict[str, Any]:
    """Return what all families state alike."""
    tokens = {f"{name}_token_id": told.token(name) for name in ("bos", "eos")}
    return {
        **{name: value for name, value in tokens.items() if value is not None},
        "dtype": _dtype(told),
        "hidden_size": told.whole("embedding_length"),
        "max_position_embeddings": told.whole("context_length"),
        "num_attention_heads": told.whole("attention.head_count"),
        "num_experts_per_tok": told.whole("expert_used_count"),
        "num_hidden_layers": told.whole("block_count") - told.whole("nextn_predict_layers", 0),
        "num_key_value_heads": told.whole("attention.head_count_kv"),
        "rms_norm_eps": told.real("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(told),
        "tie_word_embeddings": "output.weight" not in told.tensors,
        "vocab_size": told.size("token_embd.weight", 0),
    }


def _dtype(told: _Metadata) -> str:
    """Return the dtype to compute in: files of float32 keep it, all others mean bfloat16."""
    sizes = {True: 0, False: 0}
    for entry in told.tensors.values():
        sizes[entry.stored == "F32"] += entry.size_bytes
    return "float32" if sizes[True] > sizes[False] else "bfloat16"


def _rope(told: _Metadata) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": told.real("rope.freq_base", 1e4)}
    kind = told.text("rope.scaling.type", "none")
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(
            f"Positions scaled by the rule {kind[:40]!r} cannot be computed from GGUF yet.",
            "Choose a version of this model as safetensors.",
        )
    rope |= {"rope_type": kind, "factor": told.real("rope.scaling.factor")}
    if kind == "yarn":
        original = told.whole("rope.scaling.original_context_length")
        rope["original_max_position_embeddings"] = original
    return rope


def _head_dim(told: _Metadata) -> int:
    heads = max(told.whole("attention.head_count"), 1)
    return told.whole("attention.key_length", told.whole("embedding_length") // heads)


def _partial_rotary(told: _Metadata) -> dict[str, Any]:
    head_dim = _head_dim(told)
    rotary = told.whole("rope.dimension_count", head_dim)
    return {**_rope(told), "partial_rotary_factor": rotary / max(head_dim, 1)}


def _experts_width(told: _Metadata) -> int:
    return told.size("ffn_down_exps.weight", -1)


def _qwen3_moe(told: _Metadata) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "head_dim": _head_dim(told),
        "intermediate_size": told.whole("feed_forward_length", 1),
        "moe_intermediate_size": _experts_width(told),
        "norm_topk_prob": True,
        "num_local_experts": told.whole("expert_count"),
    }


def _qwen2_moe(told: _Metadata) -> dict[str, Any]:
    return {
        "model_type": "qwen2_moe",
        "intermediate_size": told.whole("feed_forward_length", 1),
        "moe_intermediate_size": _experts_width(told),
        "norm_topk_prob": False,
        "num_experts": told.whole("expert_count"),
        "qkv_bias": told.has("attn_q.bias"),
        "shared_expert_intermediate_size": told.size("ffn_down_shexp.weight", -1),
    }


def _gpt_oss(told: _Metadata) -> dict[str, Any]:
    rope = _rope(told)
    if rope["rope_type"] == "yarn":
        rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    return {
        "model_type": "gpt_oss",
        "head_dim": _head_dim(told),
        "intermediate_size": _experts_width(told),
        "num_local_experts": told.whole("expert_count"),
        "rope_parameters": rope,
        "sliding_window": told.whole("attention.sliding_window"),
    }


def _mixtral(told: _Metadata) -> dict[str, Any]:
    return {
        "model_type": "mixtral",
        "head_dim": told.whole("rope.dimension_count", _head_dim(told)),
        "intermediate_size": _experts_width(told),
        "num_local_experts": told.whole("expert_count"),
    }


def _deepseek(told: _Metadata) -> dict[str, Any]:
    """DeepSeek V2 (softmax routing) and V3 (sigmoid): one architecture to llama.cpp."""
    rank = told.whole("attention.kv_lora_rank")
    rotary = told.whole("rope.dimension_count")
    compressed = told.has("attn_k_b.weight")
    key, value = ("key_length_mla", "value_length_mla") if compressed else ("key_length",) * 2
    if not compressed:
        value = "value_length"
    rope = _rope(told)
    if rope["rope_type"] == "yarn":
        scale = told.real("rope.scaling.yarn_log_multiplier", 0.0) * 10
        rope |= {"mscale": scale, "mscale_all_dim": scale, "beta_fast": 32.0, "beta_slow": 1.0}
    groups = told.whole("expert_group_count", 1)
    config = {
        "model_type": "deepseek_v3",
        "first_k_dense_replace": told.whole("leading_dense_block_count", 0),
        "intermediate_size": told.whole("feed_forward_length"),
        "kv_lora_rank": rank,
        "moe_intermediate_size": _experts_width(told),
        "n_group": groups,
        "n_routed_experts": told.whole("expert_count"),
        "n_shared_experts": told.whole("expert_shared_count", 0),
        "norm_topk_prob": told.flag("expert_weights_norm", False),
        # One key-value head to llama.cpp, which multiplies by attn_k_b first.
        "num_key_value_heads": told.whole("attention.head_count"),
        "q_lora_rank": told.whole("attention.q_lora_rank", 0) or None,
        "qk_nope_head_dim": told.whole(f"attention.{key}") - rotary,
        "qk_rope_head_dim": rotary,
        "rope_parameters": rope,
        "routed_scaling_factor": told.real("expert_weights_scale", 1.0),
        "topk_group": told.whole("expert_group_used_count", 1),
        "v_head_dim": told.whole(f"attention.{value}"),
    }
    if told.whole("expert_gating_func", _SOFTMAX) == _SOFTMAX:
        method = "group_limited_greedy" if groups > 1 else "greedy"
        config |= {"model_type": "deepseek_v2", "topk_method": method}
    return config


def _qwen3_5_moe(told: _Metadata) -> dict[str, Any]:
    # transformers makes lists as long as these say, so they have to fit the tensors.
    keys, values = told.whole("ssm.group_count"), told.whole("ssm.time_step_rank")
    rows = 2 * keys * told.whole("ssm.state_size") + told.whole("ssm.inner_size")
    for key, size, leaf in (
        ("time_step_rank", values, "ssm_a"),
        ("inner_size", rows, "attn_qkv.weight"),
    ):
        if keys < 1 or values % keys or size != told.size(leaf, 0):
            told.wrong(f"ssm.{key}", size)
    config = mapped_config(told.architecture, told.metadata, tuple(told.tensors))
    config.pop("vocab_size")  # That of the embeddings counts.
    return config


def _glm4_moe(told: _Metadata) -> dict[str, Any]:
    return {
        "model_type": "glm4_moe",
        "attention_bias": told.has("attn_q.bias"),
        "first_k_dense_replace": told.whole("leading_dense_block_count", 0),
        "head_dim": _head_dim(told),
        "intermediate_size": told.whole("feed_forward_length"),
        "moe_intermediate_size": _experts_width(told),
        "n_group": told.whole("expert_group_count", 1),
        "n_routed_experts": told.whole("expert_count"),
        "n_shared_experts": told.whole("expert_shared_count", 0),
        "norm_topk_prob": told.flag("expert_weights_norm", True),
        "rope_parameters": _partial_rotary(told),
        "routed_scaling_factor": told.real("expert_weights_scale", 1.0),
        "topk_group": told.whole("expert_group_used_count", 1),
        "use_qk_norm": told.has("attn_q_norm.weight"),
    }


def _minimax_m2(told: _Metadata) -> dict[str, Any]:
    return {
        "model_type": "minimax_m2",
        "head_dim": _head_dim(told),
        "intermediate_size": _experts_width(told),
        "num_local_experts": told.whole("expert_count"),
        "rope_parameters": _partial_rotary(told),
    }


FAMILIES: dict[str, Callable[[_Metadata], dict[str, Any]]] = {
    "deepseek2": _deepseek,
    "glm4moe": _glm4_moe,
    "gpt-oss": _gpt_oss,
    "llama": _mixtral,
    "minimax-m2": _minimax_m2,
    "qwen2moe": _qwen2_moe,
    "qwen35moe": _qwen3_5_moe,
    "qwen3moe": _qwen3_moe,
}


def _refuse(architecture: str) -> NoReturn:
    if architecture in _NO_EXPERTS:
        raise UnsupportedModelError(
            f"This {architecture} model has no routed experts.",
            "PreScope is for Mixture-of-Experts models; any other runs in a common chat program.",
        )
    known = ", ".join(sorted(FAMILIES))
    raise UnsupportedModelError(
        f"GGUF models of the architecture {architecture[:60]!r} cannot be run yet.",
        f"Choose the same model as safetensors, or a GGUF of {known}.",
    )
